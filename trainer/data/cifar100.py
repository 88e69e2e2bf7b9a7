"""CIFAR-100: 32x32 pictures of a hundred classes."""

from __future__ import annotations

from pathlib import Path

from logshift.trainer.data.base import layout_error
from logshift.trainer.data.cifar import Cifar, Examples

LAYOUT = """\
cifar100-train.parquet   columns image (JPEG or PNG bytes) and label (0 to 99)
cifar100-test.parquet
or the original files:
cifar-100-python/train, test
cifar-100-binary/train.bin, test.bin"""


class Cifar100(Cifar):
    """CIFAR-100 with its fine labels; see `Cifar`."""

    name = "CIFAR-100"
    layout = LAYOUT
    labels = tuple(
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
        "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach "
        "couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster "
        "house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree "
        "motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
        "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket "
        "rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
        "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip "
        "turtle wardrobe whale willow_tree wolf woman worm".split()
    )

    def _originals(self, root: Path, table: str) -> tuple[Examples, Examples]:
        pickled, binary = root / "cifar-100-python", root / "cifar-100-binary"
        if pickled.is_dir():
            files = [pickled / "train", pickled / "test"]
            train, test = (self._pickled(path, b"fine_labels") for path in files)
        elif binary.is_dir():
            # Two labels each: the superclass and the class.
            files = [binary / "train.bin", binary / "test.bin"]
            train, test = (self._binary(path, 2) for path in files)
        else:
            fault = f"no {table}, no {pickled.name} and no {binary.name}"
            raise layout_error(root, fault, LAYOUT)
        return train, test
