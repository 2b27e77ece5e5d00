"""Small TFDS data sets, written by TFDS itself under the real names, in several files a split."""

import pathlib
from collections.abc import Mapping, Sequence

EXAMPLES_IN_A_FILE = 2


def write(folder: pathlib.Path, name: str, splits: Mapping[str, Sequence[Mapping[str, str | float]]]) -> None:
    """Writes a data set such as 'wiki40b/en:1.3.0' as it lies in TFDS's folder; its fields are texts and numbers."""
    import numpy as np
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info

    path, _, version = name.partition(":")
    place = folder / path / version
    place.mkdir(parents=True)
    name, _, config = path.partition("/")
    identity = dataset_info.DatasetIdentity(
        name=name, config_name=config or None, version=tfds.core.Version(version), data_dir=str(place), module_name=""
    )
    record = next(iter(splits.values()))[0]
    kinds = {name: tfds.features.Text() if isinstance(value, str) else np.float32 for name, value in record.items()}
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(kinds))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=EXAMPLES_IN_A_FILE)
    writer.initialize_splits(list(splits))
    writer.add_examples({split: list(records) for split, records in splits.items()})
    writer.close_all()
