"""Every data set on a tiny one of its layout, made up here."""

import io
import pickle
import struct
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from logshift.trainer.data import DATA_SETS, DataError, bayer, open_data
from logshift.trainer.data.base import middle
from logshift.trainer.data.low_light import darkened
from logshift.trainer.data.pictures import normalise, to_tensor
from logshift.trainer.data.sony import Sony
from logshift.trainer.data.sony import read_long as develop
from logshift.trainer.data.sony import read_short as read_mosaic


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


def make_cifar10(root, name="cifar10", first=0):
    for split, count in (("train", 10), ("test", 5)):
        images = [encoded(picture(i)) for i in range(count)]
        pq.write_table(
            pa.table({"image": images, "label": [first + i % 10 for i in range(count)]}),
            root / f"{name}-{split}.parquet",
        )
    return {}


def make_cifar100(root):
    return make_cifar10(root, "cifar100", first=90)


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
    "cifar100": ((3, 32, 32), ()),
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
    assert total == {"cifar10": 5, "cifar100": 5, "imagenet": 4, "voc": 4}.get(name, 3)
    same(tested, list(data.test(2)))
    if name not in ("voc", "camvid", "sony"):
        assert tested[0][0].shape[1:] == data.shape

    inputs = data.calibration(3)
    assert inputs.dtype == torch.float32 and len(inputs) == 3 and len(data.calibration(99)) > 4
    assert torch.equal(inputs, data.calibration(3))
    if name in ("voc", "sony"):  # whose pictures differ in size, or are large
        assert inputs.shape[1:] == SHAPES[name][0]
    else:
        assert inputs.shape[1:] == tested[0][0].shape[1:]


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


def test_augmentation_follows_from_seed_and_epoch_apart_from_the_order(case):
    name, root, options = case
    data = open_data(name, root, options)

    def whatever_order(epoch, seed):
        x, _ = next(data.train(epoch, data.size, seed))
        return x.flatten(1).abs().double().sum(1).sort().values

    first = whatever_order(0, 1)
    torch.testing.assert_close(whatever_order(0, 1), first)
    for other in (whatever_order(1, 1), whatever_order(0, 2)):
        assert (other != first).any()


def test_worker_processes_read_the_same(case):
    name, root, options = case
    alone = open_data(name, root, options)
    workers = {} if name.startswith("cifar") else {"workers": 2}  # those are in memory
    helped = open_data(name, root, options | workers)
    epoch = list(alone.train(0, 3, seed=1))
    same(epoch, list(helped.train(0, 3, seed=1)))
    # What processes that are not forked would be sent.
    same(epoch, list(pickle.loads(pickle.dumps(alone)).train(0, 3, seed=1)))


def test_sony_keeps_the_long_exposures_used_last(tmp_path):
    make_sony(tmp_path)
    read = []
    data = Sony(tmp_path, workers=0, kept=2, long=lambda path: read.append(path) or read_long(path))
    files = [long for _, long, _ in data.train_items[:3]]
    for number in (0, 1, 0, 2, 0, 1):  # 1 is the one not used for longest when 2 comes
        np.testing.assert_array_equal(data._picture(files[number]), read_long(files[number]))
    assert read == [files[0], files[1], files[2], files[1]]


def test_worker_processes_are_not_sent_the_long_exposures_that_are_kept(tmp_path):
    options = make_sony(tmp_path)
    data = open_data("sony", tmp_path, options)
    before = len(pickle.dumps(data))
    data.calibration(4)
    assert len(data._pictures) == 4
    assert len(pickle.dumps(data)) == before


def test_reading_draws_nothing_from_the_random_numbers_of_networks(case):
    name, root, options = case
    data = open_data(name, root, options)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    next(data.train(0, 2, seed=1))
    next(data.test(1))
    data.calibration(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_not_there(case, tmp_path_factory):
    name, root, options = case
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DataError, match=r"(?s)expected\n.*(parquet|Parquet|\.txt|val/)"):
        open_data(name, empty, options)
    with pytest.raises(DataError, match="data_options"):
        open_data(name, root, {"nonsense": 1})


def test_a_package_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rawpy", None)
    monkeypatch.delitem(sys.modules, "logshift.trainer.data.sony")
    with pytest.raises(DataError, match="sony needs .* not installed: pip install rawpy$"):
        open_data("sony", tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_are_plain(tmp_path, workers):
    options = make_voc(tmp_path) | {"workers": workers}
    for path in (tmp_path / "VOCdevkit/VOC2012/JPEGImages").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"^example \d: cannot read"):
        list(open_data("voc", tmp_path, options).train(0, 2, 1))


def table(path, image, label):
    pq.write_table(pa.table({"image": image, "label": label}), path)


PNG = encoded(picture(1))


@pytest.mark.parametrize("image, label, message", [
    ([PNG, PNG[:200]], [1, 2], "cifar10-test.parquet, row 1: cannot read a picture"),
    ([PNG, b"text"], [1, 2], "row 1: cannot read a picture"),
    ([PNG, None], [1, 2], r"(?s)has no image in row 1; expected\n"),
    ([{"path": "a"}], [1], "has no image in row 0"),
    ([PNG, PNG], [1, 10], "labels are not 2 integers from 0 to 9"),
    ([encoded(picture(1, 31))], [1], "not 32x32"),
])  # fmt: skip
def test_malformed_tables(tmp_path, image, label, message):
    make_cifar10(tmp_path)
    table(tmp_path / "cifar10-test.parquet", image, label)
    with pytest.raises(DataError, match=message):
        open_data("cifar10", tmp_path)


def test_files_that_are_no_table_or_lack_a_column(tmp_path):
    make_cifar10(tmp_path)
    test = tmp_path / "cifar10-test.parquet"
    pq.write_table(pa.table({"picture": [PNG]}), test)
    with pytest.raises(DataError, match="has no column image but picture; expected\n"):
        open_data("cifar10", tmp_path)
    test.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cifar10-test.parquet cannot be read"):
        open_data("cifar10", tmp_path)
    test.unlink()
    with pytest.raises(DataError, match="no cifar10-test.parquet; expected\n"):
        open_data("cifar10", tmp_path)


def test_pictures_may_be_structures_with_bytes(tmp_path):
    make_cifar10(tmp_path)
    plain = next(open_data("cifar10", tmp_path).test(5))
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(5)]
    table(tmp_path / "cifar10-test.parquet", images, list(range(5)))
    same([plain], [next(open_data("cifar10", tmp_path).test(5))])


def test_malformed_folders(tmp_path):
    options = make_voc(tmp_path)
    folder = tmp_path / "VOCdevkit/VOC2012"
    labels = folder / "SegmentationClass/p8.png"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"example 0: cannot read .*p8\.png"):
        list(open_data("voc", tmp_path, options).test(1))
    label_map(1, 20, 30, 21).save(labels)
    with pytest.raises(DataError, match=r"p8\.png is \(30, 20\), its picture \(58, 40\) pixels"):
        list(open_data("voc", tmp_path, options).test(1))
    labels.unlink()
    with pytest.raises(
        DataError, match=r"no VOCdevkit/VOC2012/SegmentationClass/p8\.png; expected"
    ):
        open_data("voc", tmp_path, options)
    labels.write_bytes(whole)
    (folder / "ImageSets/Segmentation/train.txt").write_text("\n")
    with pytest.raises(DataError, match=r"train\.txt is empty; expected"):
        open_data("voc", tmp_path, options)


@pytest.mark.parametrize("line, message", [
    ("./Sony/short/a.ARW ./Sony/long/00000_00_10s.ARW", "without exposure times"),
    ("./Sony/short/b_0s.ARW ./Sony/long/00000_00_10s.ARW", "without exposure times"),
    ("./Sony/short/a.ARW", "has the line"),
    ("./Sony/short/c.ARW ./Sony/long/00000_00_10s.ARW", "no Sony/short/c.ARW"),
    ("", "is empty"),
])  # fmt: skip
def test_malformed_lists_of_sony(tmp_path, line, message):
    options = make_sony(tmp_path)
    for name in ("a.ARW", "b_0s.ARW"):
        (tmp_path / "Sony/short" / name).touch()
    (tmp_path / "Sony_test_list.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=f"(?s){message}.*expected\n"):
        open_data("sony", tmp_path, options)


def test_crops_that_do_not_fit(tmp_path):
    options = make_sony(tmp_path)
    with pytest.raises(DataError, match="planes of 16x24 are smaller than a crop, 64"):
        next(open_data("sony", tmp_path, options | {"crop": 64}).train(0, 2, seed=1))
    with pytest.raises(DataError, match="must be even"):
        open_data("low_light", tmp_path, {"crop": 15})


def test_voc_takes_the_larger_training_set_if_it_is_there(tmp_path):
    options = make_voc(tmp_path)
    folder = tmp_path / "VOCdevkit/VOC2012"
    (folder / "SegmentationClassAug").mkdir()
    for i in range(3):
        value = Image.fromarray(np.full((40, 50 + i), 20, np.uint8))
        value.save(folder / f"SegmentationClassAug/p{i}.png")
    (folder / "ImageSets/Segmentation/trainaug.txt").write_text("p0\np1\np2\n")
    data = open_data("voc", tmp_path, options)
    assert data.size == 3
    _, target = next(data.train(0, 3, seed=1))
    assert set(target.unique().tolist()) <= {20, 255}
    assert len(list(data.test(1))) == 4  # as before


def test_camvid_in_folders_is_the_same(tmp_path):
    options = make_camvid(tmp_path)
    folders = tmp_path / "folders"
    for split in ("train", "test"):
        rows = pq.read_table(tmp_path / f"camvid-{split}.parquet").to_pylist()
        for name in (split, f"{split}annot"):
            (folders / name).mkdir(parents=True)
        for i, row in enumerate(rows):
            Image.open(io.BytesIO(row["image"])).save(folders / split / f"{i}.png")
            (folders / f"{split}annot" / f"{i}.png").write_bytes(row["annotation"])
    here, there = open_data("camvid", tmp_path, options), open_data("camvid", folders, options)
    same(list(here.train(0, 3, seed=1)), list(there.train(0, 3, seed=1)))
    same(list(here.test(2)), list(there.test(2)))
    (folders / "testannot/1.png").unlink()
    with pytest.raises(DataError, match=r"no testannot/1\.png; expected"):
        open_data("camvid", folders, options)


def test_imagenet_tests_on_the_middle(tmp_path):
    options = make_imagenet(tmp_path)
    data = open_data("imagenet", tmp_path, options)
    assert data.labels == ("n01", "n02")
    tested = list(data.test(4))
    assert tested[0][1].tolist() == [0, 0, 1, 1]
    image = Image.open(tmp_path / "val/n01/0.JPEG").resize((46, 37), Image.Resampling.BILINEAR)
    expected = normalise(to_tensor(image.crop((7, 2, 39, 34))))
    assert torch.equal(tested[0][0][0], expected)


def test_low_light_keeps_every_fifth_picture_for_testing(tmp_path):
    options = make_low_light(tmp_path)
    data = open_data("low_light", tmp_path, options | {"repeat": 2})
    assert data.size == 2 * 9
    files = sorted(tmp_path.glob("*.png"))
    for (_, target), file in zip(data.test(1), files[::5], strict=True):
        whole = to_tensor(Image.open(file)).float() / 255
        assert torch.equal(target[0], whole[:, 4:36, 9:41])
    assert {path for _, path in data.train_items} == set(files) - set(files[::5])


def test_the_middle_of_inputs():
    x = torch.arange(1.0, 16).view(1, 3, 5)
    assert middle(x, 3).tolist() == [[[2, 3, 4], [7, 8, 9], [12, 13, 14]]]
    assert middle(x, 4)[0].tolist() == [[0] * 4, [1, 2, 3, 4], [6, 7, 8, 9], [11, 12, 13, 14]]


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
    # As Python 2 with an old NumPy wrote them.
    old = pickle.dumps(content, protocol=2).replace(b"numpy._core.", b"numpy.core.")
    (folder / "test_batch").write_bytes(old)
    same([(x, target)], list(open_data("cifar10", tmp_path).test(3)))
    for damaged, message in (
        (old[:100], "not a batch"),
        (pickle.dumps({b"data": pixels, b"labels": [3, 1]}), "labels are not 3 integers"),
        (pickle.dumps([1]), "not a batch"),
    ):
        (folder / "test_batch").write_bytes(damaged)
        with pytest.raises(DataError, match=f"test_batch: .*{message}"):
            open_data("cifar10", tmp_path)
    (folder / "test_batch").write_bytes(pickle.dumps(print))
    with pytest.raises(DataError, match="print is not part of CIFAR"):
        open_data("cifar10", tmp_path)


def records(pixels, classes):
    """Return pictures as the binary files have them, with another superclass than class."""
    rows = [bytes([0, number]) + row.tobytes() for number, row in zip(classes, pixels, strict=True)]
    return b"".join(rows)


def test_cifar100_in_its_original_files(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (4, 3072), dtype=np.uint8)
    classes = [[99, 0, 42, 7], [7, 99, 1, 0]]
    pickled, binary = tmp_path / "a/cifar-100-python", tmp_path / "b/cifar-100-binary"
    for folder in (pickled, binary):
        folder.mkdir(parents=True)
    for split, fine in zip(("train", "test"), classes, strict=True):
        content = {b"data": pixels, b"fine_labels": fine, b"coarse_labels": [0] * 4}
        (pickled / split).write_bytes(pickle.dumps(content))
        (binary / f"{split}.bin").write_bytes(records(pixels, fine))
    found = [open_data("cifar100", tmp_path / folder) for folder in "ab"]
    for data in found:
        x, target = next(data.test(4))
        assert data.size == 4 and target.tolist() == classes[1]
        # Planes of red, green and blue, row by row.
        expected = normalise(torch.from_numpy(pixels.reshape(4, 3, 32, 32).copy()))
        assert torch.equal(x, expected)
        assert len(set(data.labels)) == 100 and sorted(data.labels) == list(data.labels)
    same(*(list(data.train(0, 2, seed=1)) for data in found))


@pytest.mark.parametrize("content, message", [
    (b"", "0 bytes are not records of 3074"),
    (bytes(3073), "3073 bytes are not records of 3074"),
    (bytes([0, 100]) + bytes(3072), "labels are not 1 integers from 0 to 99"),
    (None, r"no test\.bin; expected\n"),
])  # fmt: skip
def test_malformed_records(tmp_path, content, message):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "train.bin").write_bytes(bytes(3074))
    if content is not None:
        (folder / "test.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_data("cifar100", tmp_path)


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


def dng(mosaic):
    """Return the bytes of a raw picture that LibRaw reads: TIFF, 16 bits, not compressed."""
    height, width = mosaic.shape
    pixels = mosaic.astype("<u2").tobytes()
    short, long = "H", "I"
    matrix = struct.pack("<18i", *(n for i in range(9) for n in (int(i % 4 == 0), 1)))
    fields = [  # tag, type, count, bytes
        (256, 4, 1, long, width), (257, 4, 1, long, height), (258, 3, 1, short, 16),
        (259, 3, 1, short, 1), (262, 3, 1, short, 32803), (271, 2, 5, None, b"Made\0"),
        (272, 2, 3, None, b"Up\0"), (273, 4, 1, long, 0), (277, 3, 1, short, 1),
        (278, 4, 1, long, height), (279, 4, 1, long, len(pixels)),
        (33421, 3, 2, None, struct.pack("<2H", 2, 2)), (33422, 1, 4, None, bytes([0, 1, 1, 2])),
        (50706, 1, 4, None, bytes([1, 4, 0, 0])), (50708, 2, 8, None, b"Made Up\0"),
        (50714, 4, 1, long, 512), (50717, 4, 1, long, 16383), (50721, 10, 9, None, matrix),
        (50728, 5, 3, None, struct.pack("<6I", 1, 1, 1, 1, 1, 1)), (50778, 3, 1, short, 21),
    ]  # fmt: skip
    values = {f[0]: f[4] if f[3] is None else struct.pack(f"<{f[3]}", f[4]) for f in fields}
    after = 8 + 2 + 12 * len(fields) + 4
    values[273] = struct.pack("<I", after + sum(len(v) for v in values.values() if len(v) > 4))
    entries = apart = b""
    for tag, kind, count, *_ in fields:
        value = values[tag]
        if len(value) > 4:
            place, apart = struct.pack("<I", after + len(apart)), apart + value
        else:
            place = value.ljust(4, b"\0")
        entries += struct.pack("<HHI", tag, kind, count) + place
    head = b"II*\0" + struct.pack("<IH", 8, len(fields))
    return head + entries + bytes(4) + apart + pixels


def test_sony_reads_raw_files(tmp_path):
    make_sony(tmp_path)
    grey = np.full((64, 96), 512 + 100, np.uint16)
    grey[0, 0], grey[0, 1], grey[1, 0] = 16383, 0, 512  # white, below black, black
    for path in tmp_path.glob("Sony/short/*.ARW"):
        path.write_bytes(dng(grey))
    bright = np.full((64, 96), 512 + 4000, np.uint16)
    for path in tmp_path.glob("Sony/long/*.ARW"):
        path.write_bytes(dng(bright))
    x, target = next(Sony(tmp_path, workers=0).test(1))
    assert x.shape == (1, 4, 32, 48) and target.shape == (1, 3, 64, 96)
    assert x[0, :, 0, 0].tolist() == pytest.approx([1, 0, 100 * 100 / 15871, 0], rel=1e-6)
    assert x[0, :, 5:, 5:].unique().tolist() == pytest.approx([100 * 100 / 15871], rel=1e-6)
    # The same everywhere, and brighter than linear light, as it has a gamma.
    centre = target[0, :, 8:-8, 8:-8]
    assert float(centre.amax() - centre.amin()) < 0.02 and float(centre.min()) > 4000 / 15871
    for read in (read_mosaic, develop):
        (tmp_path / "bad.ARW").write_bytes(b"nothing")
        with pytest.raises(DataError, match=r"cannot read .*bad\.ARW"):
            read(tmp_path / "bad.ARW")
