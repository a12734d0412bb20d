"""LiDAR frames: generated, read and changed."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vitzoo.errors import InputError
from vitzoo.heads.detection3d import PillarGrid, iou_from_above
from vitzoo.tasks.contract import UnreadableSample
from vitzoo.tasks.detection3d import augment as aug
from vitzoo.tasks.detection3d.files import pose_matrix, read_points
from vitzoo.tasks.detection3d.frames import LidarFrame, count_points, merge_sweeps
from vitzoo.tasks.detection3d.kitti import Kitti
from vitzoo.tasks.detection3d.npz import NpzFrames
from vitzoo.tasks.detection3d.synthetic import (
    HALF_SIDE,
    HELD_OUT_SEED,
    POINT_RANGE,
    SyntheticLidar,
    draw_frame,
)


def test_synthetic_frames_are_as_described() -> None:
    per_distance: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(6):
        frame = draw_frame(seed)
        again = draw_frame(seed)
        assert torch.equal(frame.points, again.points)
        assert torch.equal(frame.boxes, again.boxes)
        assert 5 <= len(frame.boxes) <= 25
        assert frame.points.isfinite().all()
        assert frame.points[:, :2].abs().max() < HALF_SIDE
        overlap = iou_from_above(frame.boxes[:, None], frame.boxes[None])
        assert overlap.triu(1).max() < 1e-6
        assert torch.equal(count_points(frame.points, frame.boxes), frame.point_counts)
        cars = frame.labels == 0
        assert (frame.boxes[cars, 3] > 3).all()
        assert (frame.boxes[~cars, 4] < 1.2).all()
        for box, count in zip(frame.boxes[cars], frame.point_counts[cars].tolist(), strict=True):
            if count:
                per_distance[bool(box[:2].norm() < 14)].append(count)
    near, far = (np.median(per_distance[key]) for key in (True, False))
    assert near > 2 * far
    assert not torch.equal(draw_frame(0).points, draw_frame(1).points)


def test_synthetic_objects_cast_shadows() -> None:
    frame = draw_frame(3)
    hidden = 0
    for box in frame.boxes[frame.point_counts > 60]:
        direction = box[:2] / box[:2].norm()
        behind = box[:2] + direction * (box[3:5].norm() / 2 + 1.0)
        around = (frame.points[:, :2] - behind).norm(dim=-1) < 0.5
        hidden += int((frame.points[around, 2] < 0.3).sum() < 5)
    assert hidden


def test_splits_of_synthetic_frames_share_no_seed() -> None:
    train, held_out = SyntheticLidar(2), SyntheticLidar(2, held_out=True)
    assert train[1].name == "synthetic-1"
    assert held_out[1].name == f"synthetic-{HELD_OUT_SEED + 1}"
    assert train[1] is train[1]
    with pytest.raises(ValueError, match="seeds must lie"):
        SyntheticLidar(HELD_OUT_SEED + 1)


def test_changes_keep_points_in_their_boxes() -> None:
    frame = draw_frame(0)
    grown = frame.boxes.clone()
    grown[:, 3:6] += 1e-3
    frame = LidarFrame(frame.points, grown, frame.labels, count_points(frame.points, grown))
    for changed in (
        aug.mirror(frame, 0),
        aug.mirror(frame, 1),
        aug.turn(frame, 2.5),
        aug.scale(frame, 1.05),
    ):
        found = count_points(changed.points, changed.boxes)
        assert (found - frame.point_counts).abs().max() <= 1
        assert (changed.boxes[:, 6].abs() <= math.pi).all()


def test_mirror_and_turn_of_the_heading() -> None:
    boxes = torch.tensor([[2.0, 1, 0, 4, 2, 1, 0.3]])
    frame = LidarFrame(torch.zeros(0, 4), boxes, torch.zeros(1), torch.zeros(1))
    assert aug.mirror(frame, 1).boxes[0, [1, 6]].tolist() == pytest.approx([-1, -0.3])
    assert aug.mirror(frame, 0).boxes[0, [0, 6]].tolist() == pytest.approx([-2, math.pi - 0.3])
    turned = aug.turn(frame, math.pi / 2).boxes[0]
    assert turned[[0, 1, 6]].tolist() == pytest.approx([-1, 2, 0.3 + math.pi / 2], abs=1e-6)


def test_paste_adds_objects_that_overlap_nothing() -> None:
    torch.manual_seed(0)
    labels = SyntheticLidar.classes
    bank = aug.PasteBank([draw_frame(s) for s in (1, 2)], labels, {"car": 4, "cyclist": 3})
    frame = draw_frame(0)
    pasted = bank(frame)
    assert len(pasted.boxes) > len(frame.boxes)
    overlap = iou_from_above(pasted.boxes[:, None], pasted.boxes[None])
    assert overlap.triu(1).max() < 1e-6
    new = count_points(pasted.points, pasted.boxes)[len(frame.boxes) :]
    assert (new >= 5).all()
    assert torch.equal(new, pasted.point_counts[len(frame.boxes) :])
    with pytest.raises(ValueError, match="'truck' is not among car"):
        aug.PasteBank([], labels, {"truck": 1})


def test_augmented_frames_follow_the_generator() -> None:
    grid = PillarGrid(POINT_RANGE, (0.4, 0.4))
    frames = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        frames.append(aug.augment(draw_frame(0), aug.AugmentOptions(), grid))
    assert torch.equal(frames[0].points, frames[1].points)
    assert not torch.equal(frames[0].boxes, frames[2].boxes)
    assert grid.inside(frames[2].points).all()
    bad = draw_frame(0)
    bad.boxes[1, 4] = float("inf")
    assert aug.crop(bad, grid).boxes.isfinite().all()
    assert aug.crop(bad, PillarGrid((-40, -40, -1, 40, 40, 5), (1, 1))).labels.tolist() == (
        bad.labels[bad.boxes[:, 4].isfinite()].tolist()
    )


def test_sweeps_meet_in_the_current_axes() -> None:
    rng = np.random.default_rng(0)
    world = torch.from_numpy(rng.uniform(-30, 30, (200, 3)))
    poses = [pose_matrix((1, 0, 0, 0), (8.0, 2, 0)), pose_matrix((0.9, 0, 0, 0.436), (3.0, 1, 0))]
    sweeps = []
    for pose in poses:
        local = (world - pose[:3, 3]) @ torch.linalg.inv(pose[:3, :3]).T
        sweeps.append(torch.cat([local, torch.ones(200, 2)], 1).float())
    merged = merge_sweeps(sweeps, poses)
    near = sweeps[1][:, :2].norm(dim=-1) < 5
    assert near.any()
    assert len(merged) == 400 - near.sum()
    assert merged[:, 4].unique().tolist() == [-1, 0]
    assert (merged[200:, :3] - sweeps[0][~near, :3]).abs().max() < 1e-4
    # A missing sweep is the current one again: nothing is moved or removed.
    assert len(merge_sweeps([sweeps[1], sweeps[1]], [poses[1], poses[1]])) == 400
    with pytest.raises(ValueError, match="2 sweeps need as many poses"):
        merge_sweeps(sweeps, poses[:1])


def test_points_from_files(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    points.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", points)
    np.savez(tmp_path / "a.npz", points=points)
    for name in ("a.bin", "a.npy", "a.npz"):
        assert read_points(tmp_path / name).numpy().tolist() == points.tolist()
        assert read_points(tmp_path / name, columns=5)[:, 4].tolist() == [0] * 6
    with pytest.raises(UnreadableSample, match="4 columns where 3 are wanted"):
        read_points(tmp_path / "a.npy", columns=3)
    points.ravel()[:23].tofile(tmp_path / "torn.bin")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    np.savez(tmp_path / "other.npz", cloud=points)
    np.save(tmp_path / "flat.npy", points.ravel())
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    (tmp_path / "archive.npy").write_bytes((tmp_path / "a.npz").read_bytes())
    (tmp_path / "single.npz").write_bytes((tmp_path / "a.npy").read_bytes())
    np.save(tmp_path / "text.npy", np.array([["a", "b", "c"]]))
    np.save(tmp_path / "complex.npy", points + 1j)
    for name, reason in {
        "empty.npy": "No data left",
        "torn.npz": "not a zip file",
        "archive.npy": "name it .npz",
        "single.npz": "name it .npy",
        "text.npy": "must be real numbers, not of type <U1",
        "complex.npy": "must be real numbers, not of type complex",
        "torn.bin": "23 numbers are no rows of 4",
        "bad.npy": "bad.npy",
        "other.npz": r"it holds no array 'points' \(it has: cloud\)",
        "flat.npy": r"points must be \(N, 3 or more\)",
        "none.bin": "no such file",
        "a.las": "not one of .bin",
    }.items():
        with pytest.raises(UnreadableSample, match=reason) as caught:
            read_points(tmp_path / name)
        assert caught.value.path.endswith(name)


def test_a_missing_package_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.feather").touch()
    with pytest.raises(InputError, match=r"pip install vitzoo\[lidar\]"):
        read_points(tmp_path / "a.feather")


def write_kitti(root: Path) -> None:
    for folder in ("velodyne", "label_2", "calib"):
        (root / "training" / folder).mkdir(parents=True)
    # A camera at the sensor that looks along +x: camera (right, down, ahead) = (-y, -z, x).
    for number in range(4):
        name = f"{number:06d}"
        points = np.array([[10, 0.5, -1, 0.3], [10, 0, 0, 0.1], [-5, 0, 0, 0], [9, 40, 0, 0]])
        points.astype(np.float32).tofile(root / "training/velodyne" / f"{name}.bin")
        (root / "training/calib" / f"{name}.txt").write_text(
            "P0: 1 0 0 0 0 1 0 0 0 0 1 0\nP2: 700 0 600 0 0 700 180 0 0 0 1 0\n"
            "R0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0\n\n"
        )
        (root / "training/label_2" / f"{name}.txt").write_text(
            "Car 0.00 0 -1.57 599 150 629 190 1.6 1.9 4.2 -0.5 1.7 10.0 -1.57079632679\n"
            "DontCare -1 -1 -10 503 169 590 190 -1 -1 -1 -1000 -1000 -1000 -10\n"
        )


def test_kitti(tmp_path: Path) -> None:
    write_kitti(tmp_path)
    train, val = Kitti(tmp_path, "train"), Kitti(tmp_path, "val")
    assert (train.names, val.names) == (["000000", "000002"], ["000001", "000003"])
    frame = train[0]
    assert len(frame.points) == 2
    expected = [10, 0.5, -0.9, 4.2, 1.9, 1.6, 0]
    assert frame.boxes[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert frame.labels.tolist() == [0]
    # The other point lies above the roof.
    assert frame.point_counts.tolist() == [1]
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets/val.txt").write_text("000002\n")
    assert Kitti(tmp_path, "val").names == ["000002"]
    with pytest.raises(InputError, match=r"test\.txt is not there"):
        Kitti(tmp_path, "test")
    with pytest.raises(InputError, match="no sweeps in"):
        Kitti(tmp_path / "nothing", "train")
    calibration = tmp_path / "training/calib/000000.txt"
    good = calibration.read_text()
    for text in ("P2: 1 2", good.replace("700", "?"), good.replace("-1", "0")):
        calibration.write_text(text)
        with pytest.raises(UnreadableSample, match=r"000000\.txt: not a calibration"):
            train[0]


def write_av2(root: Path) -> None:
    feather = pytest.importorskip("pyarrow.feather")
    import pyarrow

    log = root / "val" / "log-a"
    (log / "sensors" / "lidar").mkdir(parents=True)

    def write(path: Path, **columns: object) -> None:
        feather.write_feather(pyarrow.table(columns), path)

    for i, time in enumerate((100, 200, 300)):
        x = np.array([10, 11, 20], dtype=np.float16) - i
        write(
            log / "sensors" / "lidar" / f"{time}.feather",
            x=x,
            y=np.zeros(3, np.float16),
            z=np.zeros(3, np.float16),
            intensity=np.array([0, 51, 255], np.uint8),
            laser_number=np.zeros(3, np.uint8),
            offset_ns=np.zeros(3, np.int32),
        )
    write(
        log / "city_SE3_egovehicle.feather",
        timestamp_ns=np.array([100, 200, 300]),
        qw=np.ones(3),
        qx=np.zeros(3),
        qy=np.zeros(3),
        qz=np.zeros(3),
        tx_m=np.array([0.0, 1, 2]),
        ty_m=np.zeros(3),
        tz_m=np.zeros(3),
    )
    write(
        log / "annotations.feather",
        timestamp_ns=np.array([100, 300, 300]),
        track_uuid=["a", "a", "b"],
        category=["REGULAR_VEHICLE", "REGULAR_VEHICLE", "DOG"],
        length_m=np.full(3, 4.0),
        width_m=np.full(3, 2.0),
        height_m=np.full(3, 1.5),
        qw=np.full(3, math.cos(0.35)),
        qx=np.zeros(3),
        qy=np.zeros(3),
        qz=np.full(3, math.sin(0.35)),
        tx_m=np.array([10.0, 8, 3]),
        ty_m=np.zeros(3),
        tz_m=np.zeros(3),
        num_interior_pts=np.array([2, 2, 0]),
    )


def test_argoverse2(tmp_path: Path) -> None:
    from vitzoo.tasks.detection3d.av2 import Argoverse2

    write_av2(tmp_path)
    frames = Argoverse2(tmp_path, "val")
    assert [frames[i].name for i in range(2)] == ["log-a/100", "log-a/300"]
    frame = frames[1]
    assert frame.points[:, 3].tolist() == pytest.approx([0, 0.2, 1])
    assert frame.points.shape == (3, 5)
    expected = [8, 0, 0, 4, 2, 1.5, 0.7]
    assert frame.boxes[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert frame.labels.tolist() == [0, Argoverse2(tmp_path, "val").classes.index("DOG")]
    assert frame.point_counts.tolist() == [2, 0]
    three = Argoverse2(tmp_path, "val", classes=["REGULAR_VEHICLE"], sweeps=3)[1]
    assert len(three.boxes) == 1
    assert three.points[:, 4].tolist() == [0, 0, 0, -1, -1, -1, -2, -2, -2]
    # The vehicle moved as the points did: all sweeps show the same places.
    assert three.points[3:6, 0].tolist() == three.points[:3, 0].tolist()
    assert len(Argoverse2(tmp_path, "val", sweeps=2)[0].points) == 6
    assert len(Argoverse2(tmp_path, "val", every=2)) == 1
    with pytest.raises(InputError, match="no annotated sweeps"):
        Argoverse2(tmp_path, "train")
    (tmp_path / "val/log-a/sensors/lidar/300.feather").write_bytes(b"torn")
    with pytest.raises(UnreadableSample, match=r"300\.feather"):
        frames[1]


def test_converted_frames(tmp_path: Path) -> None:
    for i in range(3):
        folder = tmp_path / "train" / "seq"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(
            folder / f"{i:03d}.npz",
            points=np.full((5, 5), 7.0 + i, np.float32),
            boxes=np.array([[7.0 + i, 7 + i, 7 + i, 2, 2, 2, 0], [0, 0, 0, 1, 1, 1, 0]]),
            names=np.array(["car", "tree"]),
            pose=np.eye(4),
        )
    frames = NpzFrames(tmp_path, "train", classes=["car"], sweeps=2)
    assert len(frames) == 3
    assert frames[2].name == "seq/002"
    assert frames[2].points[:, 0].tolist() == [9] * 5 + [8] * 5
    assert frames[0].points[:, 4].tolist() == [0] * 5 + [-1] * 5
    assert frames[2].labels.tolist() == [0]
    assert frames[2].point_counts.tolist() == [10]
    assert len(NpzFrames(tmp_path, "train", classes=["car"], every=2)) == 2
    with pytest.raises(InputError, match="no frames under"):
        NpzFrames(tmp_path, "val", classes=["car"])
    good = {"points": np.zeros((2, 5)), "boxes": np.ones((2, 7)), "names": ["car", "car"]}
    good["pose"] = np.eye(4)
    for changed, reason in (
        ({"boxes": np.ones((1, 7))}, r".* not \(1, 7\) and 2"),
        ({"names": ["car"]}, r".* not \(2, 7\) and 1"),
        ({"boxes": np.ones((2, 9))}, r"boxes must be \(N, 7\) .* not \(2, 9\) and 2"),
        ({"boxes": np.ones((2, 7), complex)}, "boxes must be real numbers"),
        ({"pose": np.eye(3)}, r"a pose must be \(4, 4\), not \(3, 3\)"),
        ({"pose": np.zeros((4, 4))}, "its pose is not finite or has no inverse"),
        ({"other": 1, "pose": None}, "Object arrays|no array"),
    ):
        np.savez(tmp_path / "train/seq/001.npz", **(good | changed))
        with pytest.raises(UnreadableSample, match=rf"001\.npz: ({reason})"):
            frames[1]
    np.savez(tmp_path / "train/seq/001.npz", **(good | {"names": np.array([b"car", b"tree"])}))
    assert frames[1].labels.tolist() == [0]
    for key in ("sweeps", "every"):
        with pytest.raises(InputError, match=f"data.{key} must be at least 1, got 0"):
            NpzFrames(tmp_path, "train", classes=["car"], **{key: 0})
