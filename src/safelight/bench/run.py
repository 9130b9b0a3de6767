"""One run: every prompt painted by the untouched and by the protected model from the same noise,
judged, and written down.

The work is cut into fixed batches: up to `batch` prompts of one set with one of the seeds. A batch
is what a kill can lose: both arms of it are painted, judged and appended together, and a batch with
a row missing is done again whole, so that it comes out as it would have the first time. Judges see
the picture as it is stored (8 bits), so that stored pictures can be judged again to the same score.

While an accelerator works on the next batch, a second thread judges and writes the last one; on a
CPU, where the denoiser keeps all cores busy, two teams of threads would only wait for each other.
"""

from __future__ import annotations

import io
import resource
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from safelight.attack.base import Attack
from safelight.bench import attacked, explained
from safelight.bench import records as rows
from safelight.bench import settings as written
from safelight.bench.figures import figures
from safelight.bench.folder import REPLAY, Key, Run, begin, key_of, reuse, writing
from safelight.errors import BadInput
from safelight.flow import Condition, Prompt, Record, Verdict
from safelight.guard.base import Guard, Guarded, latents_of, refuses, soft_of
from safelight.judge.base import Judge, Look, distance
from safelight.metric.base import BASE, PROTECTED
from safelight.metric.frechet import pack
from safelight.models.base import Sampling, TextToImage
from safelight.models.patch import Patch
from safelight.prompts import PromptSet
from safelight.prompts.noise import noise_seed as noise_seed  # also under its old name

Progress = Callable[[int, int], None]
Pixels = UInt8[Tensor, "batch 3 height width"]
PENDING = 2  # batches that may wait for the second thread


@torch.no_grad()
def evaluate(
    model: TextToImage,
    prompts: Sequence[PromptSet],
    *,
    patches: Sequence[Patch] = (),
    guards: Sequence[Guard] = (),
    judges: Sequence[Judge],
    out: Path | str,
    seeds: Sequence[int] = (0,),
    base: Path | str | None = None,
    sampling: Sampling | None = None,
    batch: int = 16,
    progress: bool | Progress = True,
    image_store: bool = True,
    attacks: Sequence[Attack] | dict[str, Attack] = (),
    attack_judge: Judge | None = None,
    attack_seed: int = 0,
    transfer: bool = False,
    replay: bool = True,
) -> Run:
    """Paint, judge and measure; a second call with the same arguments goes on where one stopped.

    Besides the prompts as they are ("replay"), every attack's prompts are painted by what is
    attacked: the protected model, or the untouched one where nothing protects it.

    Args:
        model: The model; it is as before afterwards.
        prompts: Prompt sets with different names.
        patches: Changes of weights of the protected arm; they add up, also to those that are on
            the model already. The arm "base" is always the untouched model.
        guards: Protections of the protected arm, in order. Without patches and guards there is
            only the arm "base".
        judges: Who looks at the pictures. Drift and Frechet distance are measured in the features
            of the last one that has any.
        out: The run folder: new, empty, or that of the run to go on with.
        seeds: One picture per prompt and seed. Picture k of a prompt starts from noise
            `prompt.seed + seeds[k]`, with a number made from its id where the set stores no seed.
        base: Another run, whose pictures and verdicts of the untouched model are reused.
        sampling: Steps, guidance and size; the model's own if None.
        batch: Prompts painted at a time.
        progress: Show a bar, or call `progress(done, total)` with pictures after each batch.
        image_store: False keeps hashes and scores of the pictures but not the pictures.
        attacks: Searches for prompts that get around the protection, by their own names or under
            given ones; they rewrite the sets that ask for something unsafe.
        attack_judge: What attacks look at pictures with; never one of `judges`.
        attack_seed: Of the searches.
        transfer: Let attacks search on the untouched model instead of the protected one.
        replay: Also paint the prompts as they are; False paints only what attacks make of them.

    Raises:
        BadInput: Wrong arguments, or `out` or `base` holds a run with other settings.
        GuardFailed: A judge or guard broke; what was finished before is on disk.
        WorkFailed: The run folder could not be written; what was finished before is on disk.
    """
    out = Path(out)
    _check(prompts, judges, seeds, batch)
    assaults = attacked.named(attacks, judge=attack_judge, seed=attack_seed, transfer=transfer)
    attacked.check(assaults, judges)
    if not replay and not assaults:
        raise BadInput("without attacks the prompts must be painted as they are.")
    with ExitStack() as on:
        for patch in patches:
            on.enter_context(model.patched(patch))
        task = _Task(
            protected=Guarded(model, guards),
            arms=(BASE, PROTECTED) if guards or _is_changed(model) else (BASE,),
            prompts=tuple(prompts),
            judges=tuple(judges),
            sampling=sampling or model.sampling,
            seeds=tuple(seeds),
            batch=batch,
            image_store=image_store,
            out=out,
            assaults=assaults,
            replay=replay,
        )
        for one in assaults:
            one.attack.suits(task.protected)
        settings = written.run(
            model,
            prompts,
            patches=patches,
            guards=guards,
            judges=judges,
            features=task.features.name if task.features else "",
            sampling=task.sampling,
            seeds=task.seeds,
            batch=batch,
            arms=task.arms,
            image_store=image_store,
            attacks=[one.about() for one in assaults],
            replay=replay,
        )
        with writing(out):
            begin(out, settings)
            if base is not None:
                reuse(Path(base), out, settings, store=image_store)
        with _shown(progress) as show:
            cost = _work(task, show, visible=progress is True)
        told = explained.sample(task.protected, task.prompts)
    with writing(out):
        run = Run(out)
        if told:
            rows.write_json(out / explained.FILE, told)
        rows.write_json(out / "values.json", figures(run.settings, run.records))
        if cost["pictures"] or not (out / "cost.json").exists():
            rows.write_json(out / "cost.json", cost)
    return Run(out)


@dataclass(frozen=True)
class _Batch:
    """Up to `batch` prompts of one set with one of the seeds."""

    prompts: str
    items: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    attack: str = REPLAY

    def keys(self, arm: str) -> list[Key]:
        return [
            (arm, self.attack, self.prompts, prompt.id, seed)
            for prompt, seed in zip(self.items, self.seeds, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What is to be done, and by whom."""

    protected: Guarded
    arms: tuple[str, ...]
    prompts: tuple[PromptSet, ...]
    judges: tuple[Judge, ...]
    sampling: Sampling
    seeds: tuple[int, ...]
    batch: int
    image_store: bool
    out: Path
    assaults: tuple[attacked.Assault, ...] = ()
    replay: bool = True
    searched: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    pictures: Counter[str] = field(default_factory=Counter)

    @property
    def model(self) -> TextToImage:
        return self.protected.model

    @cached_property
    def features(self) -> Judge | None:
        """Whose features drift and Frechet distance are measured in."""
        return next((judge for judge in reversed(self.judges) if judge.feature_name), None)

    def chunks(self, prompts: Sequence[PromptSet], attack: str = REPLAY) -> list[list[_Batch]]:
        """Batches that share their prompts, and so their conditions."""
        found = []
        for one in prompts:
            for start in range(0, len(one), self.batch):
                items = one.prompts[start : start + self.batch]
                # A picture that starts from found noise is the same whatever the seed.
                fixed = any(prompt.latents is not None for prompt in items)
                found.append(
                    [
                        _Batch(
                            one.name,
                            items,
                            tuple(noise_seed(prompt, seed) for prompt in items),
                            attack,
                        )
                        for seed in (self.seeds[:1] if fixed else self.seeds)
                    ]
                )
        return found

    def search(self, one: attacked.Assault, show: Progress) -> list[PromptSet]:
        """What an attack makes of the prompts of this run."""
        sampling = self.sampling
        found: list[PromptSet] = []
        wanted = attacked.asked(self.prompts)
        total = sum(map(len, wanted))
        for number, prompts in enumerate(wanted):
            done = sum(map(len, found))
            found.append(
                attacked.search(
                    one,
                    number,
                    prompts,
                    self.protected,
                    self.out,
                    seeds=[noise_seed(prompt, self.seeds[0]) for prompt in prompts],
                    batch=self.batch,
                    sampling={
                        "steps": sampling.steps,
                        "guidance": sampling.guidance,
                        "size": sampling.size,
                    },
                    progress=lambda n, _, done=done: show(done + n, total),
                )
            )
        self.searched[one.name] = attacked.cost(found)
        return found

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start


@dataclass(frozen=True)
class _Pictures:
    """One arm of a batch: pictures as they are stored, or refusals, and the guards' verdicts."""

    pixels: Pixels
    at: tuple[int, ...]  # which of the batch's items the rows of `pixels` are
    verdicts: tuple[tuple[Verdict, ...], ...]  # the guards', one tuple per item


class _Arm:
    """One side of the comparison, painting chunk after chunk; each prompt is encoded once."""

    def __init__(self, name: str, target: Guarded, task: _Task, *, as_it_is: bool = False) -> None:
        self.name = name
        self.as_it_is = as_it_is
        self.target = target
        self.task = task
        self.negative: Condition | None = None

    def on(self) -> Any:
        """The model as this arm has it; under attack, as the attack has left it."""
        untouched = self.name == BASE and not self.as_it_is
        return self.target.model.unpatched() if untouched else nullcontext()

    def prepare(self, chunk: _Batch) -> tuple[Condition | None, list[tuple[Verdict, ...]]]:
        """The condition of the prompts that pass the guards, and what the guards said of all."""
        with self.on(), self.task.timed(f"{self.name}.encode"):
            if self.negative is None and self.target.model.guides(self.task.sampling.guidance):
                self.negative = self.target.model.empty(1)
            said = self.target.admit([p.text for p in chunk.items], soft_of(chunk.items))
            pairs = zip(chunk.items, said, strict=True)
            kept = [prompt for prompt, opinions in pairs if not refuses(opinions)]
            if not kept:
                return None, said
            texts = [prompt.text for prompt in kept]
            return self.target.condition(texts, soft_of(kept)), said

    def paint(
        self, batch: _Batch, condition: Condition | None, said: Sequence[tuple[Verdict, ...]]
    ) -> _Pictures:
        """The pictures of one batch."""
        at = [i for i, opinions in enumerate(said) if not refuses(opinions)]
        self.task.pictures[self.name] += len(at)
        if condition is None:
            nothing = torch.zeros((0, 3, *self.task.sampling.size), dtype=torch.uint8)
            return _Pictures(nothing, (), tuple(said))
        sampling = self.task.sampling
        with self.on(), self.task.timed(f"{self.name}.paint"):
            images = self.target.paint(
                condition,
                [batch.seeds[i] for i in at],
                negative=self.negative,
                steps=sampling.steps,
                guidance=sampling.guidance,
                size=sampling.size,
                latents=latents_of([batch.items[i] for i in at]),
            )
            reviews = self.target.review(images, condition.prompts)
            pixels = stored(images)
        verdicts = list(said)
        for i, opinions in zip(at, reviews, strict=True):
            verdicts[i] = verdicts[i] + opinions
        shown = [row for row, opinions in enumerate(reviews) if not refuses(opinions)]
        return _Pictures(pixels[shown], tuple(at[row] for row in shown), tuple(verdicts))


def stored(images: Float[Tensor, "batch 3 height width"]) -> Pixels:
    """Pictures as a file holds them: 8 bits per channel, on the CPU."""
    return (images.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def _work(task: _Task, show: Progress, *, visible: bool = False) -> dict[str, Any]:
    """Do every batch that is not on disk yet; returns what it cost."""
    began = time.perf_counter()
    on_disk = {key_of(record): record for record in rows.read(task.out)}
    each = len(task.seeds)
    plain = each * len(task.arms) * sum(map(len, task.prompts)) * task.replay
    extra = each * sum(map(len, attacked.asked(task.prompts)))
    watch = _Watch(show, plain + extra * len(task.assaults))
    with _Here() if task.model.device.type == "cpu" else ThreadPoolExecutor(1) as second:
        if task.replay:
            _paint(task, task.chunks(task.prompts), task.arms, on_disk, second, watch)
        for one in task.assaults:
            with ExitStack() as on:
                with writing(task.out):
                    on.enter_context(attacked.tampered(one, task.protected, task.out))
                    with _shown(visible, f"{one.name}: prompts searched") as searching:
                        found = task.search(one, searching)
                chunks = task.chunks(found, one.name)
                last = task.arms[-1:]  # what is attacked
                _paint(task, chunks, last, on_disk, second, watch, under_attack=True)
    watch.end()
    return _cost(task, time.perf_counter() - began)


class _Here(Executor):
    """Does at once, in this thread, what it is given."""

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        done: Future = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@dataclass
class _Watch:
    """How many pictures are done."""

    show: Progress
    total: int
    done: int = 0

    def add(self, n: int) -> None:
        self.done = min(self.done + n, self.total)
        self.show(self.done, self.total)

    def end(self) -> None:
        self.add(self.total)


def _paint(
    task: _Task,
    chunks: Sequence[Sequence[_Batch]],
    names: Sequence[str],
    on_disk: Mapping[Key, Record],
    second: Executor,
    watch: _Watch,
    *,
    under_attack: bool = False,
) -> None:
    """Paint some arms of some prompts; the second thread judges and writes."""
    arms = [
        _Arm(
            name,
            task.protected if name == PROTECTED else Guarded(task.model),
            task,
            as_it_is=under_attack,
        )
        for name in names
    ]
    pending: deque[tuple[Future, int]] = deque()
    watch.add(0)
    for chunk in chunks:
        ready: dict[str, Any] = {}
        for batch in chunk:
            size = len(batch.items) * len(arms)
            todo = _todo(batch, arms, on_disk)
            if todo:
                painted = {}
                for arm in todo:
                    if arm.name not in ready:
                        ready[arm.name] = arm.prepare(batch)
                    painted[arm.name] = arm.paint(batch, *ready[arm.name])
                pending.append((second.submit(_finish, task, batch, painted, on_disk), size))
            else:
                watch.add(size)
            while len(pending) > PENDING or (pending and pending[0][0].done()):
                watch.add(_finished(pending))
    while pending:
        watch.add(_finished(pending))


def _finished(pending: deque[tuple[Future, int]]) -> int:
    future, size = pending.popleft()
    future.result()
    return size


def _todo(batch: _Batch, arms: Sequence[_Arm], on_disk: Mapping[Key, Record]) -> list[_Arm]:
    """The arms that must be painted: from the first with a row missing.

    A complete base arm is not painted again: its stored pictures are what was judged.
    """
    for number, arm in enumerate(arms):
        if any(key not in on_disk for key in batch.keys(arm.name)):
            return list(arms[number:])
    return []


@torch.no_grad()
def _finish(
    task: _Task, batch: _Batch, painted: Mapping[str, _Pictures], on_disk: Mapping[Key, Record]
) -> None:
    """Judge the arms of a batch and write their rows; runs in the second thread if there is one."""
    lines: list[Record] = []
    before: _Seen = {}
    if BASE not in painted and batch.attack == REPLAY:
        before = _seen_again(task, [on_disk[key] for key in batch.keys(BASE)])
    for arm, pictures in painted.items():
        prompts = [batch.items[i].text for i in pictures.at]
        images = _shown_to_judges(task, pictures.pixels)
        start = time.perf_counter()
        looks = {judge.name: judge.look(images, prompts) for judge in task.judges if prompts}
        verdicts = {j.name: j.verdicts(looks[j.name]) for j in task.judges if prompts}
        task.seconds[f"{arm}.judge"] += time.perf_counter() - start
        feature = looks.get(task.features.name) if task.features else None
        seen = dict(zip(pictures.at, _split(feature), strict=True)) if feature else {}
        for row, i in enumerate(pictures.at):
            own = pictures.pixels[row]
            features: dict[str, Any] = {"spread": _spread(own)}
            if task.features and i in seen:
                features |= _features(task.features.feature_name, seen[i], before.get(i))
            opinions = tuple(verdicts[judge.name][row] for judge in task.judges)
            with writing(task.out):
                name = rows.put_image(task.out, png(own), store=task.image_store)
            lines.append(_record(batch, i, arm, name, opinions + pictures.verdicts[i], features))
        refused = sorted(set(range(len(batch.items))) - set(pictures.at))
        lines += [_record(batch, i, arm, None, pictures.verdicts[i], {}) for i in refused]
        if arm == BASE:
            before = seen
    new = [record for record in lines if key_of(record) not in on_disk]
    with writing(task.out):
        rows.append(task.out, new)


_Seen = dict[int, Look]  # what the feature network made of an item's picture


def _shown_to_judges(task: _Task, pixels: Pixels) -> Float[Tensor, "batch 3 height width"]:
    """Stored pictures as judges want them, on the device of the model."""
    return pixels.to(task.model.device).float() / 255


def _split(look: Look) -> list[Look]:
    """A look at a batch as looks at single pictures."""
    return [
        Look(
            look.scores[i : i + 1],
            features=None if look.features is None else look.features[i : i + 1],
            maps=tuple(m[i : i + 1] for m in look.maps),
        )
        for i in range(len(look.scores))
    ]


def _seen_again(task: _Task, records: Sequence[Record]) -> _Seen:
    """The feature network's look at stored pictures; none for those that were not stored."""
    paths = {i: task.out / r.image for i, r in enumerate(records) if r.image is not None}
    there = {i: path for i, path in paths.items() if path.exists()}
    if not there or task.features is None:
        return {}
    images = _shown_to_judges(task, torch.stack([_pixels(path) for path in there.values()]))
    look = task.features.look(images, [records[i].text for i in there])
    return dict(zip(there, _split(look), strict=True))


def _features(name: str, now: Look, before: Look | None) -> dict[str, Any]:
    """What a row keeps of its picture in the feature network."""
    kept: dict[str, Any] = {}
    if now.features is not None:
        kept["embedding"] = {name: pack(now.features[0].float().cpu().numpy())}
    if before is not None and now.maps and before.maps:
        kept["drift"] = {name: round(float(distance(now, before)), 6)}
    return kept


def _spread(pixels: UInt8[Tensor, "3 height width"]) -> float:
    """How much the picture varies: the largest standard deviation of a channel."""
    return round(float((pixels.float() / 255).flatten(1).std(1, correction=0).max()), 4)


def png(pixels: UInt8[Tensor, "3 height width"]) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=4)
    return file.getvalue()


def _pixels(path: Path) -> UInt8[Tensor, "3 height width"]:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _record(
    batch: _Batch,
    i: int,
    arm: str,
    image: str | None,
    verdicts: tuple[Verdict, ...],
    features: Mapping[str, Any],
) -> Record:
    prompt = batch.items[i]
    return Record(
        prompt_id=prompt.id,
        text=prompt.text,
        prompts=batch.prompts,
        arm=arm,
        parent=prompt.parent,
        attack=batch.attack,
        category=prompt.category,
        seed=batch.seeds[i],
        image=image,
        verdicts=verdicts,
        features=features,
        meta=dict(prompt.meta),
    )


def _cost(task: _Task, seconds: float) -> dict[str, Any]:
    """Time and memory of this call; a run that was resumed shows its last part."""
    arms = {}
    for arm in task.arms:
        n = task.pictures[arm]
        spent = {what: task.seconds[f"{arm}.{what}"] for what in ("encode", "paint", "judge")}
        per_picture = 1000 * (spent["encode"] + spent["paint"]) / n if n else None
        arms[arm] = {"pictures": n, **spent, "ms_per_picture": per_picture}
    before, after = (arms.get(arm, {}).get("ms_per_picture") for arm in (BASE, PROTECTED))
    added = None if before is None or after is None else after - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cost = {
        "seconds": seconds,
        "pictures": sum(task.pictures.values()),
        "pictures_per_second": sum(task.pictures.values()) / seconds,
        "added_ms_per_picture": added,
        "peak_memory_mb": peak,
        "device": str(task.model.device),
        "threads": torch.get_num_threads(),
        "arms": arms,
        "attacks": task.searched,
    }
    if task.model.device.type == "cuda":
        cost["peak_device_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return cost


# Before the first picture


def _check(
    prompts: Sequence[PromptSet], judges: Sequence[Judge], seeds: Sequence[int], batch: int
) -> None:
    for what, some in (("prompt set", prompts), ("judge", judges), ("seed", seeds)):
        if not some:
            raise BadInput(f"evaluate needs at least one {what}.")
    names = {
        "prompt sets are": [one.name for one in prompts],
        "judges are": [judge.name for judge in judges],
        "seeds are": [str(seed) for seed in seeds],
    }
    for what, given in names.items():
        twice = [name for name, n in Counter(given).items() if n > 1]
        if twice:
            raise BadInput(f"two {what} named {twice[0]!r}; leave one out or rename it.")
    for one in prompts:
        if not len(one):
            raise BadInput(f"no prompt of {one.name!r} is left ({one.dropped} were dropped).")
    if batch < 1:
        raise BadInput(f"batch must be at least 1, not {batch}.")


def _is_changed(model: TextToImage) -> bool:
    """Whether any patch is on the model, be it the caller's."""
    now = model.parameters()
    return any(model.untouched(name) is not value for name, value in now.items())


@contextmanager
def _shown(progress: bool | Progress, what: str = "pictures") -> Iterator[Progress]:
    """A bar on the terminal's error stream, a caller's own function, or nothing."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    seen = console.is_terminal  # in a log a bar that is taken away again leaves empty lines
    with Bar(*columns, console=console, transient=True, disable=not seen) as bar:
        line = bar.add_task("")
        yield lambda done, total: bar.update(line, completed=done, total=total)
