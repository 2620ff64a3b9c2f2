"""Writes the files of Keras and TensorFlow as make.py does the others; each kind in an environment of its own:

    python tests/convert/foreign/make_keras.py keras3          # keras 3.15.1 on torch 2.13.0
    python tests/convert/foreign/make_keras.py keras2          # tensorflow-cpu 2.21.0, tf-keras 2.21.0
    python tests/convert/foreign/make_keras.py segmentation    # transformers 4.57.6, tensorflow-cpu, tf-keras
    python tests/convert/foreign/make_keras.py shards          # the same

The first two with keras_cv_attention_models 1.4.3. It asks for keras_core, the former name of Keras 3.
"""

import os
import sys
import zipfile

import numpy as np
from make import HERE, IMAGES, drawn_keras, folder

SIZE = {"depth": 1, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "input_shape": (16, 16, 3)}
OPTIONS = {"num_classes": 5, "pretrained": None, "classifier_activation": None}


def compact(path, source=None):
    """The same groups, attributes and data sets in the newer layout of HDF5, whose groups take a tenth of the bytes."""
    import h5py

    large = path.with_name("large")
    path.rename(large) if source is None else large.write_bytes(source)
    with h5py.File(large) as old, h5py.File(path, "w", libver="latest") as file:
        file.attrs.update(old.attrs)
        found = []
        old.visit(found.append)
        for name in found:
            if isinstance(old[name], h5py.Group):
                file.create_group(name).attrs.update(old[name].attrs)
            else:
                file.create_dataset(name, data=old[name][()]).attrs.update(old[name].attrs)
    large.unlink()


def compact_archive(path):
    """A .keras archive with its records stored as Keras stores them, and the weights as `compact` leaves them."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    inner = path.with_name("weights")
    compact(inner, records["model.weights.h5"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (records | {"model.weights.h5": inner.read_bytes()}).items():
            archive.writestr(name, content)
    inner.unlink()


def keras3():
    """BEiT on Keras 3: layers in the archive tell their names."""
    os.environ |= {"KECAM_BACKEND": "keras_core", "KERAS_BACKEND": "torch"}
    import keras

    sys.modules["keras_core"] = keras
    from keras_cv_attention_models.beit import Beit

    model, out = Beit(**SIZE, **OPTIONS), folder("keras3")
    drawn_keras(model)
    np.save(out / "logits.npy", model(IMAGES).detach().numpy())
    model.save(out / "beit.keras")
    compact_archive(out / "beit.keras")


def keras2():
    """Keras 2 with the containers of Keras 3, where layers have numbers; and a ViT as a whole model in HDF5."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    from keras_cv_attention_models.beit import Beit

    out = folder("keras2")
    vit = {"use_abs_pos_emb": True, "attn_qkv_bias": True, "layer_scale": 0, "use_mean_pooling_head": False}
    for name, more in (("beit.keras", {}), ("vit.h5", vit)):
        model = Beit(**SIZE, **OPTIONS, **more)
        drawn_keras(model)
        np.save(out / f"{name}.npy", model(IMAGES).numpy())
        model.save(out / name)
    compact_archive(out / "beit.keras")
    compact(out / "vit.h5")


def segmentation():
    """TFData2VecVisionForSemanticSegmentation: TensorFlow's names in safetensors, and tf_model.h5 in shards."""
    from transformers import Data2VecVisionConfig, TFData2VecVisionForSemanticSegmentation

    size = {"image_size": 16, "patch_size": 4, "hidden_size": 4, "num_hidden_layers": 4, "num_attention_heads": 2}
    heads = {"out_indices": [1, 2, 3, 4], "auxiliary_channels": 2, "auxiliary_num_convs": 2,
             "auxiliary_concat_input": True, "num_labels": 3}  # fmt: skip
    options = {"intermediate_size": 8, "use_relative_position_bias": True, "drop_path_rate": 0.0}
    model = TFData2VecVisionForSemanticSegmentation(Data2VecVisionConfig(**size, **options, **heads))
    images = IMAGES.transpose(0, 3, 1, 2).copy()
    model(images)
    drawn_keras(model)
    for weight in model.weights:
        if "moving_variance" in weight.name:
            weight.assign(np.abs(weight.numpy()) + 0.5)
    out = folder("tensorflow_segmentation")
    np.save(out / "logits.npy", model(images).logits.numpy())
    model.save_pretrained(out, safe_serialization=True)


def shards():
    """TFData2VecVisionForImageClassification in two files, whose index names tensors otherwise than they do."""
    from transformers import Data2VecVisionConfig, TFData2VecVisionForImageClassification

    size = {"image_size": 16, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"intermediate_size": 16, "use_relative_position_bias": True, "num_labels": 5, "drop_path_rate": 0.0}
    model = TFData2VecVisionForImageClassification(Data2VecVisionConfig(**size, **options))
    images = IMAGES.transpose(0, 3, 1, 2).copy()
    model(images)
    drawn_keras(model)
    out = folder("tensorflow_shards")
    np.save(out / "logits.npy", model(images).logits.numpy())
    model.save_pretrained(out, safe_serialization=False, max_shard_size="3KB")
    for path in sorted(out.glob("*.h5")):
        compact(path)


KINDS = {each.__name__: each for each in (keras3, keras2, segmentation, shards)}

if __name__ == "__main__":
    os.chdir(HERE)
    for kind in sys.argv[1:]:
        KINDS[kind]()
