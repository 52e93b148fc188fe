"""What each dataset is: classes, published sizes of its splits, and where its files are looked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from cl_methods.datasets.texts import Classes, Family, classes, normalised

Sizes = tuple[int | None, int, int]
"""Images for training, validation and test; None where no number was published."""


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset; its class names and prompts are in :mod:`cl_methods.datasets.texts`.

    Attributes:
        name: of the task.
        sizes: published sizes of the splits by family.
        places: folders below the root in which the dataset's own files are looked for, as torchvision, CoOp and DIKI lay
            them out.
        markers: any of these in a place means that the dataset's own files are there.
        contents: what has to be there, in words.
        copies: folders below the root in which copies in a general layout are looked for (image folders, WebDataset,
            Hugging Face).
        split_file: CoOp's list of the splits, in a place; None where CoOp and DIKI use the dataset's own split.
        images: folders below a place from which the paths in the split file may start.
        coop_place: the place that CoOp, and DIKI for MNIST and CIFAR100, use.
        single: the dataset comes without a split, so one is drawn in the family ``zscl``.
        source: where its files are to be had.
    """

    name: str
    sizes: Mapping[Family, Sizes]
    places: tuple[str, ...]
    markers: tuple[str, ...]
    contents: str
    copies: tuple[str, ...]
    split_file: str | None = None
    images: tuple[str, ...] = ("",)
    coop_place: str = ""
    single: bool = False
    source: str = ""

    def classes(self, family: Family) -> Classes:
        """Class names and prompts in one family."""
        return classes(self.name, family)


def _same(train: int | None, test: int) -> Mapping[Family, Sizes]:
    """Sizes of a dataset whose own split both families use."""
    return {"zscl": (train, 0, test), "coop": (train, 0, test)}


_TABLE = (
    DatasetSpec(
        "Aircraft",
        {"zscl": (3334, 3333, 3333), "coop": (3334, 3333, 3333)},
        places=("fgvc-aircraft-2013b/data", "fgvc_aircraft", "fgvc-aircraft-2013b"),
        markers=("variants.txt", "images_variant_train.txt", "images_variant_test.txt"),
        contents="images/, variants.txt and images_variant_{train,val,test}.txt",
        copies=("Aircraft", "aircraft", "fgvc_aircraft", "fgvc-aircraft", "wds_fgvc_aircraft"),
        coop_place="fgvc_aircraft",
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/ (fgvc-aircraft-2013b.tar.gz)",
    ),
    DatasetSpec(
        "Caltech101",
        {"zscl": (6941, 0, 1736), "coop": (4128, 1649, 2465)},
        places=("caltech101", "caltech-101"),
        markers=("101_ObjectCategories",),
        contents="101_ObjectCategories/",
        copies=("Caltech101", "caltech101", "caltech-101", "wds_vtab-caltech101"),
        split_file="split_zhou_Caltech101.json",
        images=("101_ObjectCategories",),
        single=True,
        coop_place="caltech-101",
        source="https://data.caltech.edu/records/mzrjq-6wc02 (caltech-101.zip, then 101_ObjectCategories.tar.gz in it)",
    ),
    DatasetSpec(
        "CIFAR100",
        {"zscl": (50000, 0, 10000), "coop": (40000, 10000, 10000)},
        places=("cifar-100-python", "cifar100/cifar-100-python", "cifar100"),
        markers=("meta",),
        contents="train, test and meta",
        copies=("CIFAR100", "cifar100", "cifar-100", "wds_vtab-cifar100"),
        coop_place="cifar100",
        source="https://www.cs.toronto.edu/~kriz/cifar.html (cifar-100-python.tar.gz)",
    ),
    DatasetSpec(
        "DTD",
        {"zscl": (1880, 1880, 1880), "coop": (2820, 1128, 1692)},
        places=("dtd/dtd", "dtd"),
        markers=("labels",),
        contents="images/ and labels/{train,val,test}1.txt",
        copies=("DTD", "dtd", "wds_vtab-dtd"),
        split_file="split_zhou_DescribableTextures.json",
        images=("images",),
        coop_place="dtd",
        source="https://www.robots.ox.ac.uk/~vgg/data/dtd/ (dtd-r1.0.1.tar.gz)",
    ),
    DatasetSpec(
        "EuroSAT",
        {"zscl": (21600, 0, 5400), "coop": (13500, 5400, 8100)},
        places=("eurosat", "EuroSAT"),
        markers=("2750",),
        contents="2750/",
        copies=("EuroSAT", "eurosat", "wds_vtab-eurosat"),
        split_file="split_zhou_EuroSAT.json",
        images=("2750",),
        single=True,
        coop_place="eurosat",
        source="https://huggingface.co/datasets/torchgeo/eurosat (EuroSAT.zip)",
    ),
    DatasetSpec(
        "Flowers102",
        {"zscl": (1020, 1020, 6149), "coop": (4093, 1633, 2463)},
        places=("flowers-102", "oxford_flowers"),
        markers=("imagelabels.mat", "setid.mat", "jpg"),
        contents="jpg/, imagelabels.mat and setid.mat",
        copies=("Flowers102", "flowers102", "flowers-102", "oxford_flowers", "wds_vtab-flowers"),
        split_file="split_zhou_OxfordFlowers.json",
        images=("jpg",),
        coop_place="oxford_flowers",
        source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (102flowers.tgz, imagelabels.mat, setid.mat)",
    ),
    DatasetSpec(
        "Food101",
        {"zscl": (75750, 0, 25250), "coop": (50500, 20200, 30300)},
        places=("food-101", "food101/food-101"),
        markers=("meta",),
        contents="images/ and meta/{train,test}.json",
        copies=("Food101", "food101", "food-101", "wds_food101"),
        split_file="split_zhou_Food101.json",
        images=("images",),
        coop_place="food-101",
        source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/ (food-101.tar.gz)",
    ),
    DatasetSpec(
        "MNIST",
        {"zscl": (60000, 0, 10000), "coop": (48000, 12000, 10000)},
        places=("MNIST/raw", "mnist", "MNIST"),
        markers=tuple(
            f"{part}-{what}{end}"
            for part in ("train", "t10k")
            for what in ("images-idx3-ubyte", "labels-idx1-ubyte")
            for end in ("", ".gz")
        ),
        contents="{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte, with or without .gz,",
        copies=("MNIST", "mnist", "wds_mnist"),
        coop_place="mnist",
        source="https://ossci-datasets.s3.amazonaws.com/mnist/ (the four *-ubyte.gz files)",
    ),
    DatasetSpec(
        "OxfordPet",
        {"zscl": (3680, 0, 3669), "coop": (2944, 736, 3669)},
        places=("oxford-iiit-pet", "oxford_pets"),
        markers=("annotations",),
        contents="images/ and annotations/{trainval,test}.txt",
        copies=("OxfordPet", "oxford_pets", "oxford-iiit-pet", "wds_vtab-pets"),
        split_file="split_zhou_OxfordPets.json",
        images=("images",),
        coop_place="oxford_pets",
        source="https://www.robots.ox.ac.uk/~vgg/data/pets/ (images.tar.gz, annotations.tar.gz)",
    ),
    DatasetSpec(
        "StanfordCars",
        {"zscl": (8144, 0, 8041), "coop": (6509, 1635, 8041)},
        places=("stanford_cars",),
        markers=("devkit", "cars_train", "cars_test"),
        contents="devkit/cars_{meta,train_annos}.mat, cars_test_annos_withlabels.mat, cars_train/ and cars_test/",
        copies=("StanfordCars", "stanford_cars", "cars", "wds_cars"),
        split_file="split_zhou_StanfordCars.json",
        coop_place="stanford_cars",
        source="https://github.com/pytorch/vision/issues/7545#issuecomment-1631441616 (the original address is gone)",
    ),
    DatasetSpec(
        "SUN397",
        {"zscl": (87003, 0, 21751), "coop": (15880, 3970, 19850)},
        places=("SUN397", "sun397/SUN397", "sun397"),
        markers=("ClassName.txt", "a"),
        contents="a/ to y/",
        copies=("SUN397", "sun397", "wds_sun397"),
        split_file="split_zhou_SUN397.json",
        images=("SUN397", ""),
        single=True,
        coop_place="sun397",
        source="https://vision.princeton.edu/projects/2010/SUN/ (SUN397.tar.gz; where it is gone, a copy of it)",
    ),
    DatasetSpec(
        "CIFAR10",
        _same(50000, 10000),
        places=("cifar-10-batches-py", "cifar10/cifar-10-batches-py", "cifar10"),
        markers=("batches.meta", "data_batch_1", "test_batch"),
        contents="data_batch_1 to data_batch_5, test_batch and batches.meta",
        copies=("CIFAR10", "cifar10", "wds_vtab-cifar10"),
        source="https://www.cs.toronto.edu/~kriz/cifar.html (cifar-10-python.tar.gz)",
    ),
    DatasetSpec(
        "TinyImageNet",
        _same(100000, 10000),
        places=("tiny-imagenet-200", "tinyimagenet/tiny-imagenet-200", "tinyimagenet"),
        markers=("wnids.txt",),
        contents="train/, val/ and wnids.txt",
        copies=("TinyImageNet", "tinyimagenet", "tiny-imagenet"),
        source="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    ),
    DatasetSpec(
        "ImageNet100",
        _same(None, 5000),
        places=("imagenet100", "imagenet", "ImageNet", "ILSVRC2012"),
        markers=("train", "val"),
        contents="train/ and val/ with a folder for every class",
        copies=("ImageNet100",),
        source="https://image-net.org (ILSVRC2012, validation images sorted into folders)",
    ),
    DatasetSpec(
        "ImageNet1000",
        _same(1281167, 50000),
        places=("imagenet", "ImageNet", "ILSVRC2012", "imagenet1000"),
        markers=("train", "val"),
        contents="train/ and val/ with a folder for every class",
        copies=("ImageNet1000",),
        source="https://image-net.org (ILSVRC2012, validation images sorted into folders)",
    ),
    DatasetSpec(
        "ImageNetR",
        _same(24000, 6000),
        places=("imagenet-r", "ImageNet-R", "imagenet_r"),
        markers=("n01443537", "n01484850"),
        contents="a folder for every class",
        copies=("ImageNetR",),
        single=True,
        source="https://github.com/hendrycks/imagenet-r (imagenet-r.tar)",
    ),
    DatasetSpec(
        "CUB200",
        _same(5994, 5794),
        places=("CUB_200_2011", "cub200/CUB_200_2011", "cub200"),
        markers=("images.txt", "classes.txt", "train_test_split.txt"),
        contents="images/, images.txt, classes.txt, image_class_labels.txt and train_test_split.txt",
        copies=("CUB200", "cub", "wds_cub"),
        source="https://data.caltech.edu/records/65de6-vp158 (CUB_200_2011.tgz)",
    ),
)

DATASETS: Mapping[str, DatasetSpec] = MappingProxyType({spec.name: spec for spec in _TABLE})
"""Every dataset, by the name of its task."""


def meant(name: str) -> str | None:
    """The dataset that a name in another spelling, or a part of it, is likely to mean: ``mnist``, ``Aircaft``, ``Flowers``."""
    known = {normalised(each): each for each in DATASETS}
    wanted = normalised(name)
    close = [wanted] if wanted in known else get_close_matches(wanted, known, n=1)
    close = close or [each for each in known if wanted and wanted in each]
    return known[close[0]] if close else None
