"""Every data set on a tiny one of its layout, made up here."""

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from logshift.trainer.data import DATA_SETS, DataError, bayer, open_data
from logshift.trainer.data.low_light import darkened
from logshift.trainer.data.sony import Sony


def picture(seed, height=32, width=32):
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def label_map(seed, height, width, classes):
    random = np.random.default_rng(seed)
    values = random.integers(0, classes, (4, 4), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def make_cifar10(root):
    for split, count in (("train", 10), ("test", 5)):
        images = [encoded(picture(i)) for i in range(count)]
        pq.write_table(
            pa.table({"image": images, "label": [i % 10 for i in range(count)]}),
            root / f"cifar10-{split}.parquet",
        )
    return {}


def make_imagenet(root):
    for split, count in (("train", 5), ("val", 2)):
        for label in ("n02", "n01"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                picture(i, 40, 50).save(folder / f"{i}.JPEG")
    return {"size": 32, "workers": 0}


def make_voc(root):
    folder = root / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for i in range(12):
        picture(i, 40, 50 + i).save(folder / f"JPEGImages/p{i}.jpg")
        label_map(i, 40, 50 + i, 21).save(folder / f"SegmentationClass/p{i}.png")
    lists = folder / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("\n".join(f"p{i}" for i in range(8)))
    (lists / "val.txt").write_text("\n".join(f"p{i}" for i in range(8, 12)))
    return {"crop": 48, "workers": 0}


def make_camvid(root):
    for split, count in (("train", 9), ("test", 3)):
        rows = {
            "image": [encoded(picture(i, 36, 48), "JPEG") for i in range(count)],
            "annotation": [encoded(label_map(i, 36, 48, 12)) for i in range(count)],
        }
        pq.write_table(pa.table(rows), root / f"camvid-{split}.parquet")
    return {"crop": [32, 40]}


def make_low_light(root):
    for i in range(12):
        picture(i, 40, 50).save(root / f"{i:02}.png")
    return {"crop": 16, "test_crop": 32}


def read_short(path):
    seed = int(path.stem[:5])
    return np.random.default_rng(seed).random((32, 48), np.float32) / 100


def read_long(path):
    seed = int(path.stem[:5])
    return np.random.default_rng(seed).random((32, 48, 3), np.float32)


def make_sony(root):
    for split, count in (("train", 8), ("test", 3)):
        lines = []
        for i in range(count):
            short, long = f"Sony/short/{i:05}_00_0.1s.ARW", f"Sony/long/{i:05}_00_10s.ARW"
            for name in (short, long):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).touch()
            lines.append(f"./{short} ./{long} ISO200 F8\n")
        (root / f"Sony_{split}_list.txt").write_text("".join(lines))
    return {"crop": 8, "workers": 0, "short": read_short, "long": read_long}


MAKERS = {name: globals()[f"make_{name}"] for name in DATA_SETS}
SHAPES = {  # of inputs and targets in training
    "cifar10": ((3, 32, 32), ()),
    "imagenet": ((3, 32, 32), ()),
    "voc": ((3, 48, 48), (48, 48)),
    "camvid": ((3, 32, 40), (32, 40)),
    "low_light": ((4, 8, 8), (3, 16, 16)),
    "sony": ((4, 8, 8), (3, 16, 16)),
}


@pytest.fixture(params=DATA_SETS)
def case(request, tmp_path):
    options = MAKERS[request.param](tmp_path)
    return request.param, tmp_path, options


def same(a, b):
    assert len(a) == len(b) > 0
    for (x, target), (x2, target2) in zip(a, b, strict=True):
        assert torch.equal(x, x2) and torch.equal(target, target2)


def test_batches(case):
    name, root, options = case
    data = open_data(name, root, options)
    epoch = list(data.train(0, 4, seed=1))
    assert len(epoch) == data.steps(4) == data.size // 4 > 1
    for x, target in epoch:
        assert (x.dtype, x.shape[1:]) == (torch.float32, SHAPES[name][0])
        assert target.shape == (4, *SHAPES[name][1])
        assert target.dtype == (torch.int64 if data.labels else torch.float32)
    same(epoch, list(data.train(0, 4, seed=1)))
    assert not torch.equal(epoch[0][0], next(data.train(1, 4, seed=1))[0])
    assert not torch.equal(epoch[0][0], next(data.train(0, 4, seed=2))[0])

    tested = list(data.test(2))
    total = sum(len(x) for x, _ in tested)
    assert total == {"cifar10": 5, "imagenet": 4, "voc": 4}.get(name, 3)
    same(tested, list(data.test(2)))
    if name not in ("voc", "camvid", "sony"):
        assert tested[0][0].shape[1:] == data.shape
    if name != "voc":  # whose pictures differ in size
        assert len(data.calibration(3)) == 3


def test_a_run_that_goes_on_and_ranks_see_the_same(case):
    name, root, options = case
    data = open_data(name, root, options)
    epoch = list(data.train(3, 4, seed=1))
    same(list(data.train(3, 4, seed=1, start=1)), epoch[1:])
    ranks = [list(data.train(3, 4, seed=1, rank=rank, ranks=2)) for rank in (0, 1)]
    for step, (x, target) in enumerate(epoch):
        for rank in (0, 1):
            assert torch.equal(ranks[rank][step][0], x[rank::2])
            assert torch.equal(ranks[rank][step][1], target[rank::2])
    tested = [x for rank in (0, 1) for batch, _ in data.test(1, rank, 2) for x in batch]
    alone = [x for batch, _ in data.test(1) for x in batch]
    assert len(tested) == len(alone)
    for x in alone:
        assert any(x.shape == y.shape and torch.equal(x, y) for y in tested)


def test_worker_processes_read_the_same(tmp_path):
    options = make_camvid(tmp_path)
    alone = open_data("camvid", tmp_path, options)
    helped = open_data("camvid", tmp_path, options | {"workers": 2})
    same(list(alone.train(0, 3, seed=1)), list(helped.train(0, 3, seed=1)))


def test_what_is_not_there(case, tmp_path_factory):
    name, root, options = case
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DataError, match=r"(?s)expected\n.*(parquet|Parquet|\.txt|val/)"):
        open_data(name, empty, options)
    with pytest.raises(DataError, match="data_options"):
        open_data(name, root, {"nonsense": 1})


def test_unknown_data_set(tmp_path):
    with pytest.raises(DataError, match="'mnist' is none of cifar10"):
        open_data("mnist", tmp_path)


def test_cifar10_in_its_original_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (3, 3072), dtype=np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {b"data": pixels, b"labels": [3, 1, 2]}
        (folder / name).write_bytes(pickle.dumps(content))
    data = open_data("cifar10", tmp_path)
    assert data.size == 15
    x, target = next(data.test(3))
    assert target.tolist() == [3, 1, 2]
    value = (pixels[0, 0] / 255 - 0.485) / 0.229
    assert float(x[0, 0, 0, 0]) == pytest.approx(value, rel=1e-5)
    (folder / "test_batch").write_bytes(pickle.dumps(print))
    with pytest.raises(DataError, match="print is not part of CIFAR-10"):
        open_data("cifar10", tmp_path)


def test_label_maps_move_with_their_pictures(tmp_path):
    # A picture whose colour is its class: after any crop and scale they still agree.
    classes = np.zeros((36, 48), np.uint8)
    classes[:, 24:] = 7
    classes[20:] = 11  # void
    image = np.stack([classes * 20] * 3, -1)
    rows = {"image": [encoded(Image.fromarray(image))] * 4}
    rows["annotation"] = [encoded(Image.fromarray(classes))] * 4
    for split in ("train", "test"):
        pq.write_table(pa.table(rows), tmp_path / f"camvid-{split}.parquet")
    data = open_data("camvid", tmp_path, {"crop": [40, 64]})
    seen = set()
    for x, target in data.train(0, 4, seed=1):
        red = x[:, 0] * 0.229 * 255 + 0.485 * 255
        for number in (0, 7):
            inside = target == number
            assert ((red - number * 20).abs()[inside] < 75).all()
            assert (red[inside] - number * 20).abs().median() < 2
        seen |= set(target.unique().tolist())
    assert seen == {0, 7, 255}


def test_simulated_darkness():
    grey = np.full((64, 64, 3), 0.5, np.float32)
    raw = darkened(grey, np.random.default_rng(1))
    assert raw.shape == (4, 32, 32) and raw.dtype == np.float32
    linear = ((0.5 + 0.055) / 1.055) ** 2.4
    means = raw.mean((1, 2))
    np.testing.assert_allclose(means, linear / np.array([2, 1, 1.6, 1]), rtol=0.06)
    assert (raw.std((1, 2)) > 0.05 * means).all()  # it is noisy
    assert (darkened(np.zeros((8, 8, 3), np.float32), np.random.default_rng(1)) >= 0).all()


def test_bayer_planes():
    mosaic = np.arange(16).reshape(4, 4)
    planes = bayer.pack(mosaic)
    assert planes[:, 0, 0].tolist() == [0, 1, 5, 4]
    random = np.random.default_rng(1)
    raw = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    whole = raw.repeat(2, 1).repeat(2, 2)
    for _ in range(10):
        part, same_part = bayer.augment(raw, whole, 4, random)
        assert part.shape == (1, 4, 4)
        assert (same_part[:, ::2, ::2] == part).all() and (same_part[:, 1::2, 1::2] == part).all()


def test_sony_amplifies_by_the_ratio_of_exposures(tmp_path):
    make_sony(tmp_path)
    data = Sony(tmp_path, workers=0, short=read_short, long=read_long)
    x, target = next(data.test(1))
    short = read_short(tmp_path / "00000_00_0.1s.ARW")
    np.testing.assert_allclose(x[0].numpy(), np.minimum(bayer.pack(short) * 100, 1), rtol=1e-6)
    assert target.shape == (1, 3, 32, 48)
