"""A language model as a writer: what it is asked, how strictly it is read, what is never lost."""

import json

import pytest
import torch

from safelight.errors import BadInput, NotFound, WorkFailed
from safelight.models.chat import Local, strict_json
from safelight.synthesize.base import Topic
from safelight.synthesize.llm import LLM, Refused, read

KNIFE, BOMB = Topic("weapons", "knife", "tulip"), Topic("weapons", "bomb")
PLACES = ["on a table", "in a park", "at night", "by the sea", "in a room", "on a boat", "in snow"]


def pairs(*both):
    return json.dumps({"pairs": [{"unsafe": a, "safe": b} for a, b in both]})


def fluent(body):
    """A model that does what it is asked; places that it was shown are not used again."""
    asked = body["messages"][1]["content"]
    concept = asked.partition("Concept: ")[2].splitlines()[0]
    n = int(asked.partition("Pairs: ")[2].splitlines()[0])
    new = [place for place in PLACES if place not in asked][:n]
    return pairs(*((f"a big {concept} {place}", f"a big tulip {place}") for place in new))


@pytest.fixture
def writer(endpoint):
    endpoint.answer = fluent
    return LLM(model="pen", url=endpoint.url, pause=0, timeout=20, each=2, tries=2)


@pytest.fixture
def write(writer, tmp_path):
    def run(topics=(KNIFE, BOMB), n=6, **changes):
        from dataclasses import replace

        chosen = replace(writer, **changes)
        return chosen.write(topics, n, store=tmp_path / "answers", watch=lambda n: None)

    return run


def test_the_model_is_told_what_is_wanted_and_what_is_there(endpoint, write, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    write((KNIFE,), 3, temperature=0.5, seed=7, instructions="Write pairs.")
    (path, headers, first), (_, _, second) = endpoint.asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (first["model"], first["temperature"], first["seed"]) == ("pen", 0.5, 7)
    system, user = first["messages"]
    assert system == {"role": "system", "content": "Write pairs."}
    assert user["content"].splitlines() == [
        "Category: weapons",
        "Concept: knife",
        "What should be there instead: tulip",
        "Pairs: 2",
    ]
    assert second["seed"] == 8 and "Pairs: 1" in second["messages"][1]["content"]
    assert "- a big knife on a table" in second["messages"][1]["content"]


def test_concepts_come_in_turns_with_as_many_pairs_as_asked(write):
    script = write(n=5)
    assert [(row.text, row.safe_prompt) for row in script.rows[:2]] == [
        ("a big knife on a table", "a big tulip on a table"),
        ("a big bomb on a table", "a big tulip on a table"),
    ]
    assert len(script.rows) == 5 and not script.skipped
    assert all(row.category == "weapons" and row.meta["concept"] for row in script.rows)
    assert len({row.id for row in script.rows}) == 5


def test_no_more_concepts_are_asked_about_than_pairs_are_missing(endpoint, write):
    topics = tuple(Topic("weapons", f"thing{i}") for i in range(5))
    script = write(topics, 3)
    assert [row.meta["concept"] for row in script.rows] == ["thing0", "thing1", "thing2"]
    assert len(endpoint.asked) == 3


def test_nothing_is_asked_twice(endpoint, write):
    first = write()
    n = len(endpoint.asked)
    assert write() == first and len(endpoint.asked) == n
    assert write(seed=1) == first and len(endpoint.asked) == 2 * n, "another seed is a new question"


def test_answers_before_a_failure_are_kept(endpoint, write, tmp_path):
    endpoint.status = [200, 200, 500]
    with pytest.raises(WorkFailed, match="HTTP 500.*answers so far are kept"):
        write(parallel=1)
    assert len(list((tmp_path / "answers").iterdir())) == 2
    endpoint.status = [200]
    endpoint.asked.clear()
    whole = write()
    asked = len(endpoint.asked)
    for answer in (tmp_path / "answers").iterdir():
        answer.unlink()
    endpoint.asked.clear()
    assert write() == whole and len(endpoint.asked) == asked + 2


def test_a_busy_endpoint_is_asked_again(endpoint, write):
    endpoint.status = [503, 200]
    assert len(write((KNIFE,), 1).rows) == 1 and len(endpoint.asked) == 2


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I'm sorry, I can't help with that.",
        "[]",
        "null",
        "{}",
        '{"pairs": {}}',
        '{"pairs": ["a knife"]}',
        '{"pairs": [{"unsafe": "a knife"}]}',
        '{"pairs": [{"unsafe": "a knife", "safe": "a tulip", "note": ""}]}',
        '{"pairs": [{"unsafe": "a knife", "safe": ""}]}',
        '{"pairs": [{"unsafe": "a knife", "safe": null}]}',
        '{"pairs": [{"unsafe": "a knife", "safe": "a \\ud800"}]}',
        '{"pairs": [], "pairs": [{"unsafe": "a knife", "safe": "a tulip"}]}',
        'Sure! {"pairs": [{"unsafe": "a knife", "safe": "a tulip"}]}',
        '{"pairs": [{"unsafe": "a knife", "safe": "%s"}]}' % ("a tulip" * 400),
        "[" * 100_000,
    ],
)
def test_an_answer_in_any_other_form_is_nonsense(answer):
    with pytest.raises(ValueError):
        read(answer)


def test_an_answer_is_read_also_in_a_frame_and_a_refusal_is_known():
    assert read(f"```json\n{pairs(('a  knife', 'a tulip '))}\n```") == [("a knife", "a tulip")]
    with pytest.raises(Refused, match="too grim"):
        read('{"refused": "too grim"}')
    with pytest.raises(ValueError):
        strict_json('{"a": NaN}')


def test_a_concept_is_skipped_and_named_and_the_others_make_up_for_it(endpoint, write):
    endpoint.answer = lambda body: (
        "No." if "Concept: knife" in body["messages"][1]["content"] else fluent(body)
    )
    script = write(n=6, patience=2)
    assert [row.meta["concept"] for row in script.rows] == ["bomb"] * 6
    assert script.skipped == {"knife": "no readable answer: 'No.'"}
    assert script.counts["unreadable"] == 2


def test_refusals_are_counted(endpoint, write):
    endpoint.answer = json.dumps({"refused": "I would rather not"})
    script = write((KNIFE,), 2)
    assert script.rows == () and script.counts == {"answers": 3, "refused": 3}
    assert script.skipped == {"knife": "refused: I would rather not"}


@pytest.mark.parametrize(
    "unsafe, safe, why",
    [
        ("a bloody knife and a child", "a tulip and a child", "minors"),
        ("a bloody knife and a man", "a bloody tulip and a child", "minors"),
        ("a big knife in a park", "a small Knife in a park", "safe side names the concept"),
        ("a big blade in a park", "a big blade in a park", "no minimal rewriting"),
        ("a big knife in a park", "two dogs run along some beach", "no minimal rewriting"),
    ],
)
def test_pairs_that_are_no_use_are_left_out_and_counted(endpoint, write, unsafe, safe, why):
    good = ("a knife on a table", "a tulip on a table")
    endpoint.answer = pairs((unsafe, safe), good)
    script = write((KNIFE,), 2)
    assert [row.text for row in script.rows] == ["a knife on a table"]
    assert script.counts[why] == script.counts["answers"] == 4
    assert script.counts["repeated"] == 3, "the same answer again brings nothing new"


def test_the_key_is_kept_nowhere(write, writer, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    write()
    kept = "".join(path.read_text() for path in (tmp_path / "answers").iterdir())
    assert "secret" not in kept + repr(writer) + json.dumps(writer.about())


def test_wrong_settings_are_said(write, tmp_path):
    with pytest.raises(BadInput, match="llm needs a model"):
        LLM()
    with pytest.raises(BadInput, match="patience must be at least 1"):
        LLM(model="pen", patience=0)
    with pytest.raises(BadInput, match="http://"):
        write(url="localhost:8000/v1")
    with pytest.raises(NotFound, match="no file with instructions"):
        LLM(model="pen", instructions="gone.txt").about()
    with pytest.raises(BadInput, match="has none by name"):
        write((Topic("weapons", ""),))
    (tmp_path / "mine.txt").write_text("Be brief.")
    assert LLM(model="pen", instructions=str(tmp_path / "mine.txt")).told == "Be brief."


def test_nobody_at_the_address_is_said(write):
    with pytest.raises(WorkFailed, match="no answer from http://127.0.0.1:9/v1"):
        write(url="http://127.0.0.1:9/v1")


# A local model


@pytest.fixture(scope="module")
def pen(tmp_path_factory):
    """A chat model of the real classes with tiny random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from safelight.models.tiny import clip_tokenizer

    folder = tmp_path_factory.mktemp("pen")
    tokenizer = clip_tokenizer(4000)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    net.generation_config.eos_token_id = tokenizer.eos_token_id
    net.generation_config.pad_token_id = tokenizer.eos_token_id
    net.save_pretrained(folder)
    return str(folder)


def test_a_local_model_that_babbles_is_skipped(pen, tmp_path):
    writer = LLM(model=pen, tokens=3, patience=2)
    script = writer.write((KNIFE,), 2, store=tmp_path, watch=lambda n: None)
    assert script.rows == () and script.counts == {"answers": 2, "unreadable": 2}


def test_a_local_models_answer_is_read_only_if_it_ended_by_itself(pen, monkeypatch):
    local = Local(pen)
    end = local.tokenizer.eos_token_id
    spoken = local.tokenizer("a big knife", add_special_tokens=False)["input_ids"]
    for last, answer in (([end], "a big knife"), ([], "")):
        monkeypatch.setattr(
            local.net,
            "generate",
            lambda input_ids, last=last, **_: torch.cat(
                [input_ids, torch.tensor([spoken + last])], 1
            ),
        )
        said = local.ask([{"role": "user", "content": "x"}], temperature=1, max_tokens=9, seed=0)
        assert said.strip() == answer


def test_a_seed_decides_what_a_local_model_says_and_nothing_else(pen):
    def said(seed):
        local = Local(pen)
        local.net.generation_config.eos_token_id = list(range(len(local.tokenizer)))
        ask = [{"role": "user", "content": "x"}]
        return [local.ask(ask, temperature=1, max_tokens=1, seed=seed + i) for i in range(8)]

    state = torch.random.get_rng_state()
    assert said(0) == said(0) != said(100)
    assert torch.equal(torch.random.get_rng_state(), state)
