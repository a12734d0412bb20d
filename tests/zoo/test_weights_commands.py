"""`vitzoo weights list | fetch | verify | info`: what they say, and with which exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vitzoo  # noqa: F401  (registers the zoo's names)
from tests.zoo.downloads import CONTENT, URL_FILE, url
from tests.zoo.hub_server import Hub
from vitzoo.cli import run


def test_legal_state_without_entries_is_an_empty_table(capsys: pytest.CaptureFixture) -> None:
    assert run(["weights", "list", "--state", "available"]) == 0
    assert capsys.readouterr().out.split() == [
        "weights",
        "task",
        "data",
        "licence",
        "state",
        "published",
    ]


@pytest.mark.parametrize(
    ("option", "given", "near"),
    [("family", "dinat", "nat"), ("family", "natt", "nat"), ("state", "unchekced", "unchecked")],
)
def test_nearest_name_is_given(
    option: str, given: str, near: str, capsys: pytest.CaptureFixture
) -> None:
    assert run(["weights", "list", f"--{option}", given]) == 2
    assert f"no weights of {option} '{given}'; did you mean {near}?" in capsys.readouterr().err


def test_info_of_a_folder_is_of_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["weights", "info", str(tmp_path)]) == 2
    assert "holds neither model.safetensors" in capsys.readouterr().err
    save_file({"w": torch.zeros(7)}, tmp_path / "model.safetensors")
    assert run(["weights", "info", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "model.safetensors") in said
    assert "params  7" in said


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vz_davit_tiny.msft_coco_mask_rcnn_1x", "of the task detection."),
        ("vz_davit_tiny.msft_ade20k_upernet", "of the task segmentation."),
        ("vz_flatformer.mit_waymo", "of the task detection3d."),
        ("vz_lookupvit_base", 'timm.create_model("vz_lookupvit_base"'),
    ],
)
def test_advice_is_what_the_task_needs(name: str, says: str, capsys: pytest.CaptureFixture) -> None:
    assert run(["weights", "fetch", name]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert ("create_model" in said) == ("model.checkpoint" not in said)


def test_verify_reads_no_hash_from_a_users_name(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "run-20240101.pth"
    torch.save({"w": torch.zeros(3)}, file)
    assert run(["weights", "verify", str(file)]) == 0
    assert "no hash is known" in capsys.readouterr().out


def test_fetch_after_the_server_has_recovered(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture, quick: None
) -> None:
    hub.files[URL_FILE] = b'{"error": "rate limited"}'
    given = ["weights", "fetch", url(hub), "--cache-dir", str(tmp_path)]
    assert run(given) == 2
    assert "delivered no weights" in capsys.readouterr().err
    hub.files[URL_FILE] = CONTENT
    assert run(given) == 0
