"""The measured tables: whose entry wins, and what a damaged one says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from forgedit_kernels import available_backends, table
from forgedit_kernels.merge_weights import MergePlan, shape_key

CPU = torch.device("cpu")
KEY = shape_key(torch.float32, torch.float32)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """Empty folders in place of the shipped and the user's tables."""
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    monkeypatch.setattr(table, "SHIPPED", shipped)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for folder in (shipped, table.user_folder()):
        folder.mkdir(parents=True)
    table.forget_tables()
    yield shipped, table.user_folder()
    table.forget_tables()


def _write(folder: Path, ops: object) -> Path:
    path = folder / table.table_name(CPU)
    path.write_text(json.dumps({"device": "here", "torch": "2", "triton": None, "commit": None, "ops": ops}))
    table.forget_tables()
    return path


def test_a_device_without_a_table_is_left_to_the_heuristics(folders: tuple[Path, Path]) -> None:
    assert table.preferred("merge_weights", CPU, KEY) is None
    assert table.blocks("merge_weights", CPU, KEY) is None


def test_the_users_entry_wins_shape_by_shape(folders: tuple[Path, Path]) -> None:
    shipped, user = folders
    ours, theirs = {"backend": "sdpa", "blocks": {"BLOCK_M": 64}}, {"backend": "triton", "blocks": {"BLOCK_M": 32}}
    _write(shipped, {"attention": {"d40": ours, "d64": ours}, "merge_weights": {KEY: {"backend": "native"}}})
    _write(user, {"attention": {"d40": theirs, "d80": {"backend": "reference", "seconds": {"reference": 1e-3}}}})
    assert [table.preferred("attention", CPU, key) for key in ("d40", "d64", "d80", "d8")] == [
        "triton", "sdpa", "reference", None,
    ]  # fmt: skip
    assert [table.blocks("attention", CPU, key) for key in ("d40", "d64", "d80", "d8")] == [
        {"BLOCK_M": 32}, {"BLOCK_M": 64}, None, None,
    ]  # fmt: skip
    assert table.preferred("merge_weights", CPU, KEY) == "native"


def test_an_op_follows_the_table(folders: tuple[Path, Path]) -> None:
    weights = [torch.ones(3)], [torch.ones(3)], [torch.empty(3)]
    assert MergePlan(*weights).backend == available_backends("cpu")[0]
    _write(folders[1], {"merge_weights": {KEY: {"backend": "reference"}}})
    assert MergePlan(*weights).backend == "reference"
    _write(folders[1], {"merge_weights": {KEY: {"backend": "triton"}}})  # it cannot run here
    assert MergePlan(*weights).backend == available_backends("cpu")[0]


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        ("{", "Expecting property name"),
        ("[]", "it has no 'ops'"),
        ('{"ops": []}', "it has no 'ops'"),
        ('{"ops": {"attention": []}}', "it has no 'ops'"),
        ('{"ops": {"attention": {"d40": {}}}}', "attention, 'd40': expected a backend among reference, native"),
        ('{"ops": {"attention": {"d40": {"backend": "auto"}}}}', "expected a backend among reference"),
        ('{"ops": {"attention": {"d40": {"backend": ["sdpa"]}}}}', "expected a backend among reference"),
        ('{"ops": {"attention": {"d40": "sdpa"}}}', "expected a backend among reference"),
        ('{"ops": {"attention": {"d40": {"backend": "triton", "blocks": {"M": 0.5}}}}}', "positive whole numbers"),
        ('{"ops": {"attention": {"d40": {"backend": "triton", "blocks": {"M": 0}}}}}', "positive whole numbers"),
        ('{"ops": {"attention": {"d40": {"backend": "triton", "blocks": 64}}}}', "positive whole numbers"),
    ],
)
def test_a_damaged_table_is_an_error_that_names_the_file(folders: tuple[Path, Path], text: str, flaw: str) -> None:
    path = _write(folders[1], {})
    path.write_text(text)
    with pytest.raises(RuntimeError, match=re.escape(flaw)) as error:
        table.preferred("attention", CPU, "d40")
    assert str(path) in str(error.value) and "forgedit autotune" in str(error.value)


def test_bytes_that_are_no_text_are_an_error_that_names_the_file(folders: tuple[Path, Path]) -> None:
    path = _write(folders[0], {})
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(RuntimeError, match=re.escape(str(path))):
        table.preferred("attention", CPU, "d40")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA H200", "nvidia-h200.json"),
        ("AMD EPYC 9B14 96-Core Processor", "amd-epyc-9b14-96-core-processor.json"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-r-xeon-r-cpu-2-20ghz.json"),
    ],
)
def test_a_table_is_named_by_its_device(name: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "device_name", lambda device: name)
    assert table.table_name(CPU) == file


def test_the_cache_folder_is_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert table.user_folder() == tmp_path / ".cache" / "forgedit" / "tables"


@pytest.mark.parametrize("path", sorted(table.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_table_is_whole(path: Path) -> None:
    assert table.read_table(path)
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert all(whole[name] for name in ("device", "torch", "commit"))
