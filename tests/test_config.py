"""A faulty configuration fails before any job, naming key path, value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from abf.config import RunConfig, load
from abf.errors import ConfigError
from abf.grid import load_study
from abf.reference import check_reference, reference_yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fault(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load(path)
        return str(caught.value)

    return write


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {optim: {lrr: 1}}", ["train.optim.lrr", "unknown key", "value 1", "'lr'"]),
        ("segmenter: {kind: sentense}", ["segmenter.kind", "sentense", "'random'", "'sentence'"]),
        ("segmenter: {length: 3}", ["segmenter.kind", "missing"]),
        ("segmenter: {kind: fixed, length: 0}", ["segmenter.length", "value 0", "greater"]),
        ("segmenter: {kind: fixed}", ["segmenter", "exactly one of `length` and `like`"]),
        ("train: {tokens: many}", ["train.tokens", "'many'", "integer"]),
        ("sources: []", ["sources", "at least 1"]),
        ("sources: [{kind: local, pth: x}]", ["sources[0].pth", "'path'"]),
        ("pack: {row_length: 32, max_block: 64}", ["pack.max_block=64", "row_length=32"]),
        (
            "sources: [{kind: lists}, {kind: stdlib}]\ntasks: {edit: {kind: lists}}",
            ["tasks.edit: sources must all be of kind 'lists', not ['lists', 'stdlib']"],
        ),
        (
            "decoders: {d: {strategy: {kind: threshold}, extent: {kind: fixed, length: 99}}}",
            ["decoders.d.extent.length=99", "max_block=64"],
        ),
        ("decoders: {d: {strategy: {kind: threshold}}}", ["decoders.d", "needs one"]),
        (
            "decoders: {d: {strategy: {kind: abf}, extent: {kind: length_head}}}",
            [
                "decoders.d.strategy.kind='abf' reads heads",
                "train.objective.corruption.kind 'path'",
            ],
        ),
        (
            "train: {objective: {kind: block, loss: {clean_stream: block_causal, ar_weight: 0}}}\n"
            "decoders: {d: {strategy: {kind: threshold}, extent: {kind: length_head}, reopen: -2}}",
            ["decoders.d.reopen=-2.0 reads the AR audit", "'block_causal'"],
        ),
        (
            "train: {objective: {kind: block, loss: {clean_stream: block_causal, ar_weight: 0}}}\n"
            "decoders: {plain: {strategy: {kind: ar}}}",
            ["decoders.plain.strategy.kind='ar'", "'block_causal'", "leave decoders.plain out"],
        ),
        (
            "train: {objective: {kind: block, corruption: {kind: path, late: 0.3}}}\n"
            "decoders: {d: {strategy: {kind: abf}, extent: {kind: length_head, late: 0.15}}}",
            ["decoders.d.extent.late=0.15", "corruption.late=0.3"],
        ),
        (
            "train: {objective: {kind: block, corruption: {kind: path, late: 0.3}}}\n"
            "decoders: {d: {strategy: {kind: path}, extent: {kind: length_head}, "
            "sampler: {temperature: 1.0}}}",
            ["decoders.d.strategy says late=0.15", "corruption says late=0.3, wrong=0.1"],
        ),
        (
            "train: {objective: {kind: ar}}",
            ["decoders.threshold_09.strategy.kind='threshold'", "'ar'"],
        ),
        (
            "base: {kind: import, checkpoint: {kind: directory, path: x}}",
            ["tokenizer.kind='trained'", "'checkpoint'"],
        ),
        (
            "train: {objective: {kind: block, loss: {clean_stream: block_causal}}}",
            ["train.objective.loss", "ar_weight"],
        ),
        ("base: {kind: pretrain, shape: {heads: 3}}", ["base.shape", "d_model (128)"]),
        ("tasks: {t: {kind: continuation, new_tokens: 600}}", ["tasks.t", "row_length=512"]),
        ("tasks: {Bad: {kind: likelihood}}", ["tasks.Bad", "a-z"]),
        ("seed: 1\nseed: 2", ["run.yaml:2", "'seed'", "line 1"]),
        ("{[1, 2]: 3}", ["run.yaml:1", "a key must be text", "a sequence"]),
        ("tasks:\n  1: {kind: likelihood}", ["run.yaml:2", "a key must be text, not 1", "quotes"]),
        ("x: &x {a: *x}", ["is not YAML", "recursive"]),
        ("study: 2024-13-45", ["is not YAML", "month must be in 1..12"]),
        ("x: &x {seed: 1}\ny: {<<: *x, k: 1, k: 2}", ["run.yaml:2", "'k'", "line 2"]),
        ("seed: '3'", ["seed", "valid integer", "'3'"]),
        ("seed: true", ["seed", "valid integer", "True"]),
        (f"seed: {2**70}", ["seed", f"value {2**70}", "less than 2147483648"]),
        ("base: {kind: pretrain, seed: -1}", ["base.seed", "value -1", "greater than or equal"]),
        ("train: {optim: {betas: [0.9, 1.5]}}", ["optim.betas[1]", "value 1.5", "less than 1"]),
        ("train: {threads: 1000}", ["train.threads", "value 1000", "less than or equal to 256"]),
        ("scoring: {threads: '2'}", ["scoring.threads", "value '2'", "integer"]),
        ("tasks: {}", ["tasks", "at least 1"]),
        ("sources: [{kind: local, path: ''}]", ["sources[0].path", "at least 1 character"]),
        *(
            (f"sources: [{{kind: stdlib, pattern: '{pattern}'}}]", [f"pattern='{pattern}'", said])
            for pattern, said in (
                ("/etc/*", "no leading `/`"),
                ("../*.py", "no `..`"),
                ("", "no empty pattern"),
                ("**.py", "as in `**/*.py`"),
            )
        ),
        ("- a", ["must hold a mapping"]),
        ("a: [", ["is not YAML"]),
        ("train: {micro_rows: 3}", ["train.micro_rows=3", "batch_rows=8"]),
        (
            "launch: {nodes: 3}",
            ["train.batch_rows=8", "12 ranks", "launch.nodes=3 x launch.ranks_per_node=4"],
        ),
        (
            "base: {kind: pretrain, train: {objective: {kind: ar}, batch_rows: 3}}",
            ["base.train.batch_rows=3", "4 ranks", "raise it, or start fewer ranks"],
        ),
    ],
)
def test_faults_name_path_value_and_choices(fault, text: str, parts: list[str]) -> None:
    message = fault(text)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (
            "study: x\ntrain:\n\ttokens: 1",
            3,
            "is not YAML ('tokens: 1'): a tab; indent",
        ),
        ("train:\n  tokens: 1\n batch_rows: 2", 3, "give the keys of one mapping the same indent"),
        ("train:\n  tokens: 1\n    batch_rows: 2", 3, "a second `: ` behind a value; indent the"),
        ("study: a: b", 1, "put text that holds `: ` in quotes"),
        ("train: {tokens: 1\nseed: 3", 2, "the bracket opened on line 1 is not closed"),
        ("seed: 3\nstudy: 'x\n", 3, "the quote opened on line 2 is not closed"),
        ("seed: 3\nstudy\n", 3, "a key without `:`"),
        ("seed: 1\nseed: 2", 2, "keep one of the two"),
        (
            "study: x\nrecipe: r.yaml",
            2,
            "recipe: 'r.yaml' belongs to an arm of a grid, and this is the file of a run: write a "
            "grid with `study: NAME`, `base: THIS_FILE.yaml` and "
            "`arms: {NAME: {recipe: r.yaml}}`",
        ),
        ("study: x\narms: {a: {}}", 2, "arms: only a grid has this key, and a grid names the run"),
        ("base: [r.yaml]\nseeds: [1]", 2, "add `base: RUN.yaml`, not ['r.yaml'], or take 'seeds'"),
        ("\n\ntrain.tokens: 3", 3, "a dotted path belongs to an arm or axis of a grid"),
        ("train:\n  - tokens: 1", 1, "train: must be a mapping (`key: value` lines), not a list"),
        ("sources: {kind: stdlib}", 1, "sources: must be a list (`[...]`, or lines that begin"),
        ("seed: 1\ntrain:\n", 2, "train: has no value; write one behind the colon, or leave"),
        ("sources:\n- kind: stdlib\n- kind: local\n  path: ''", 4, "sources[1].path: "),
        ("train:\n  optim:\n    lrr: 1", 3, "(value 1); did you mean 'lr'? Allowed: betas, "),
        ("train:\n  optim:\n    zzz: 1", 3, "unknown key (value 1). Allowed: betas, "),
        ("seed: 0\nsegmenter: {kind: sentense}", 2, "; did you mean 'sentence'?"),
        ("seed: 0\nsegmenter:\n  length: 3", 2, "which variant is meant: fixed, line, random, s"),
        ("study: No Blanks", 1, "small letters and digits, no blanks (value 'No Blanks')"),
        ("\n\npack:\n  max_block: 64\n  row_length: 32", 4, "pack.max_block=64 does not fit"),
        ("decoders:\n  d:\n    strategy: {kind: threshold}", 2, "as in `extent: {kind: length"),
    ],
)
def test_a_fault_is_one_line_that_begins_with_file_and_line(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}:{line}: ")
    assert said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "is empty: name the study at least"), ("# x\n", "is empty"), ("study:x", "with a blank")],
)
def test_a_file_without_keys_is_refused(fault, text: str, said: str) -> None:
    assert said in fault(text)


def test_every_fault_of_a_file_has_its_own_line(fault, tmp_path: Path) -> None:
    lines = fault("study: No\nseed: -1\ntrain:\n  optim: {lr: fast}").splitlines()
    path = tmp_path / "run.yaml"
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{n}" for n in (1, 2, 4)]


def test_merge_keys_and_numbers_with_an_exponent(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "base:\n  kind: pretrain\n"
        "  train: &t {objective: {kind: ar}, optim: {lr: 3e-4}, tokens: 10}\n"
        "train: {<<: *t, objective: {kind: block}, tokens: 20}\n"
    )
    config = load(path)
    assert config.train.optim.lr == 0.0003
    assert config.train.tokens == 20
    assert config.train.objective.kind == "block"


def test_a_decoder_opens_blocks_as_its_model_was_trained(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "train: {objective: {kind: block, corruption: {kind: path, late: 0.3, wrong: 0.2}}}\n"
        "decoders:\n"
        "  open: {strategy: {kind: abf}, extent: {kind: length_head}}\n"
        "  masks: {strategy: {kind: abf}, extent: {kind: length_head, late: 0}}\n"
        "  path: {strategy: {kind: path, late: 0.3, wrong: 0.2}, extent: {kind: length_head}, "
        "sampler: {temperature: 1.0}}\n"
        "  fixed: {strategy: {kind: abf}, extent: {kind: fixed, length: 4}}\n"
    )
    settled = load(path).settled_decoders
    late = {name: getattr(each.extent, "late", None) for name, each in settled.items()}
    assert late == {"open": 0.3, "masks": 0.0, "path": 0.0, "fixed": None}
    plain = RunConfig().settled_decoders["threshold_09"].extent
    assert getattr(plain, "late", None) == 0.0


def test_missing_file_and_wrong_encoding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml does not exist"):
        load(tmp_path / "nothing.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"study: caf\xe9")
    with pytest.raises(ConfigError, match="byte 10"):
        load(path)


def test_generated_reference_is_current_and_loads_as_the_defaults() -> None:
    check_reference(ROOT / "config")
    assert load(ROOT / "config" / "config.yaml") == RunConfig()


def test_a_drifted_reference_is_found(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(reference_yaml().replace("seed: 0", "seed: 1", 1))
    with pytest.raises(ConfigError, match="make reference"):
        check_reference(tmp_path)


@pytest.mark.parametrize("name", ["tiny.yaml", "smollm2.yaml", "lists.yaml"])
def test_shipped_run_files_are_valid(name: str) -> None:
    assert load(ROOT / "config" / name).study
