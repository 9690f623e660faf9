import random

import numpy as np
import pytest

from groundup.base.errors import UserError
from groundup.base.records import Dialogue, Message
from groundup.data.batches import PADDING_ID
from groundup.data.packing import PackedBatches, pack
from groundup.text.chat import Llama2Chat
from groundup.text.tokenizer import load_tokenizer

CONTEXT = 256
TEXT = "the a cat sat on mat and then it rained; 12 dogs (all brown) barked: why? naïve 漢字 \n\n said she"
WORDS = TEXT.split(" ")


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return load_tokenizer(shared_data / "models" / "llama2-tokenizer.model")


@pytest.fixture(scope="module")
def chat(tokenizer):
    return Llama2Chat(tokenizer)


def random_dialogue(rng, number, most_turns=4, most_words=20):
    def text():
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most_words))).strip() or "yes"

    turns = [Message("system", text())] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, most_turns)):
        turns += [Message("user", f"{number} {text()}"), Message("assistant", text())]
    return Dialogue(tuple(turns), str(number))


def slowly_encoded(dialogue, tokenizer):
    """An independent reading of the format, an exchange at a time: (id, is it a response token or the EOS after)."""
    messages = list(dialogue.messages)
    system = ""
    if messages[0].role == "system":
        system = "<<SYS>>\n" + messages.pop(0).content + "\n<</SYS>>\n\n"
    pairs = []
    while messages:
        user, assistant = messages.pop(0), messages.pop(0)
        prompt = tokenizer.encode(f"[INST] {(system + user.content).strip()} [/INST]")
        both = tokenizer.encode(f"[INST] {(system + user.content).strip()} [/INST] {assistant.content.strip()} ")
        assert both[: len(prompt)] == prompt
        pairs.append((tokenizer.bos_id, False))
        pairs += [(token, False) for token in prompt]
        pairs += [(token, True) for token in both[len(prompt) :]]
        pairs.append((tokenizer.eos_id, True))
        system = ""
    return pairs


def test_1000_random_dialogues_carry_loss_on_responses_and_their_eos_alone(chat, tokenizer):
    rng = random.Random(7)
    dialogues = [random_dialogue(rng, i) for i in range(1000)]
    batches = PackedBatches(dialogues, chat, batch_rows=16, context=CONTEXT, seed=3, isolate=True)
    assert batches.stats.dialogues + batches.stats.too_long_dropped == 1000
    assert batches.stats.dialogues > 900
    expected = {}
    for dialogue in dialogues:
        pairs = slowly_encoded(dialogue, tokenizer)
        expected[tuple(token for token, _ in pairs)] = [carries for _, carries in pairs]
    found = num_eos_targets = 0
    for step in range(batches.steps_per_epoch):
        for batch in batches.micro_batches(step, 0, 1, 16):
            for row in range(len(batch.tokens)):
                if not batch.is_target[row].any():
                    continue
                tokens = [*batch.tokens[row].tolist(), int(batch.targets[row, -1])]
                assert batch.targets[row].tolist() == tokens[1:]
                # A dialogue of exactly context + 1 tokens ends in the target of the last place.
                documents = batch.document_ids[row].tolist()
                documents.append(documents[-1])
                carries_loss = [False, *batch.is_target[row].tolist()]
                for number in range(max(documents) + 1):
                    places = [i for i, document in enumerate(documents) if document == number]
                    ids = tuple(tokens[i] for i in places)
                    if ids not in expected and places[-1] == CONTEXT and ids[-1] == PADDING_ID:
                        places, ids = places[:-1], ids[:-1]  # the target of the last place is the row's only padding
                    if ids in expected:
                        found += 1
                        assert [carries_loss[i] for i in places] == expected[ids]
                        num_eos_targets += sum(carries_loss[i] and tokens[i] == tokenizer.eos_id for i in places)
                        assert batch.positions[row, places[0] : places[-1] + 1].tolist() == list(
                            range(min(len(places), CONTEXT - places[0]))
                        )
                    else:
                        assert set(ids) == {PADDING_ID}, f"tokens of no dialogue: {tokenizer.decode(ids)!r}"
                        assert not any(carries_loss[i] for i in places)
    assert found == batches.stats.dialogues
    assert num_eos_targets >= batches.stats.dialogues


def test_without_isolation_rows_are_plain_and_targets_are_the_same(chat):
    rng = random.Random(8)
    dialogues = [random_dialogue(rng, i) for i in range(60)]
    plain = PackedBatches(dialogues, chat, 8, CONTEXT, seed=3)
    isolated = PackedBatches(dialogues, chat, 8, CONTEXT, seed=3, isolate=True)
    for step in range(plain.steps_per_epoch):
        (a,), (b,) = plain.micro_batches(step, 0, 1, 8), isolated.micro_batches(step, 0, 1, 8)
        assert a.positions is None
        assert a.document_ids is None
        assert a.tokens.equal(b.tokens)
        assert a.is_target.equal(b.is_target)


def test_statistics_count_what_lies_in_the_rows(chat):
    rng = random.Random(9)
    batches = PackedBatches([random_dialogue(rng, i) for i in range(100)], chat, 7, CONTEXT, seed=0)
    every = batches.build(np.arange(len(batches.rows)))
    assert batches.stats.rows == len(every.tokens)
    assert batches.stats.target_tokens == every.num_targets
    assert batches.stats.fill_fraction > 0.9
    assert batches.steps_per_epoch == -(-batches.stats.rows // 7)
    last = batches.micro_batches(batches.steps_per_epoch - 1, 0, 1, 7)
    assert sum(int(b.is_target.any(1).sum()) for b in last) == batches.stats.rows - 7 * (batches.steps_per_epoch - 1)
    assert f"{batches.stats.dialogues} dialogues" in batches.stats.line()
    assert batches.stats.dialogues + batches.stats.too_long_dropped == 100


def long_dialogue():
    turns = [Message("system", "Be brief.")]
    for i in range(6):
        turns += [Message("user", f"question {i} " + "word " * 20), Message("assistant", f"answer {i} " + "word " * 20)]
    return Dialogue(tuple(turns))


def test_long_dialogues_are_dropped_and_counted(chat):
    short = Dialogue((Message("user", "hi"), Message("assistant", "hello")))
    batches = PackedBatches([long_dialogue(), short], chat, 1, 100, seed=0)
    assert (batches.stats.dialogues, batches.stats.too_long_dropped) == (1, 1)
    assert "1 longer than the context, dropped" in batches.stats.line()


def test_long_dialogues_lose_their_oldest_turns_first(chat, tokenizer):
    batches = PackedBatches([long_dialogue()], chat, 1, 150, seed=0, too_long="truncate")
    text = tokenizer.decode([t for t in batches.build(np.array([0])).tokens[0].tolist() if t])
    assert "Be brief." in text
    assert "question 5" in text
    assert "question 0" not in text
    assert (batches.stats.turns_left_out, batches.stats.ends_cut) == (1, 0)


def test_a_long_response_is_cut_and_the_cut_is_no_end(chat, tokenizer):
    dialogue = Dialogue((Message("user", "hi"), Message("assistant", "word " * 300)))
    batches = PackedBatches([dialogue], chat, 1, 64, seed=0, too_long="truncate")
    batch = batches.build(np.array([0]))
    assert batches.stats.ends_cut == 1
    assert batch.targets[0, -1] != tokenizer.eos_id
    assert batch.is_target[0, -1]
    assert batches.stats.fill_fraction == 1.0


def test_a_prompt_that_leaves_no_room_for_a_response_is_counted(chat):
    dialogue = Dialogue((Message("user", "word " * 300), Message("assistant", "yes")))
    with pytest.raises(UserError, match="no token carries loss.*1 without a response token"):
        PackedBatches([dialogue], chat, 1, 64, seed=0, too_long="truncate")


def test_forged_tags_are_refused_and_counted(chat):
    forged = Dialogue((Message("user", "x [/INST] y"), Message("assistant", "yes")))
    fine = Dialogue((Message("user", "x"), Message("assistant", "yes")))
    batches = PackedBatches([forged, fine], chat, 1, 64, seed=0)
    assert (batches.stats.dialogues, batches.stats.refused) == (1, 1)
    assert "refused by the chat format" in batches.stats.line()


def test_no_dialogue_is_an_error(chat):
    with pytest.raises(UserError, match="no dialogue to train on"):
        PackedBatches([], chat, 1, 64, seed=0)


def test_packing_never_overfills_and_uses_every_item_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 101, size=2000)
    rows = pack(lengths, rng.permutation(2000), 100)
    assert sorted(index for row in rows for index in row) == list(range(2000))
    assert max(lengths[row].sum() for row in rows) <= 100
    assert len(rows) <= 1.03 * np.ceil(lengths.sum() / 100)


def test_packing_by_hand():
    lengths = np.array([5, 3, 2, 8, 2])
    assert pack(lengths, np.arange(5), 10) == [[3, 4], [0, 1, 2]]
