"""How image-text datamodules get from files to what a model is fed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from eqben_tree import QUADS, module, objects, write_images
from jsonargparse import ArgumentParser
from PIL import Image
from pytorch_lightning import LightningDataModule
from torchvision import transforms


@pytest.fixture
def eqben(tmp_path):
    return write_images(tmp_path)


def image_of(data):
    data.setup("test")
    return next(iter(data.test_dataloader()))["image0"]


@pytest.fixture
def picture(eqben):
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((80, 60))
    image.save(eqben / "image" / QUADS[0][0])
    return image


def test_a_size_squeezes_the_whole_image_into_a_square(eqben, picture):
    plain = transforms.Compose(
        [
            transforms.Resize((32, 32), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    assert torch.equal(image_of(module(eqben, objects(QUADS), transform=32))[0], plain(picture))


def test_a_timm_name_gives_what_its_weights_were_evaluated_with(eqben, picture):
    name = "vit_base_patch16_siglip_224.webli"  # not ImageNet's mean and std
    config = timm.data.resolve_model_data_config(timm.create_model(name))
    expected = timm.data.create_transform(**config)(picture)
    found = image_of(module(eqben, objects(QUADS), transform=f"timm:{name}"))[0]
    assert found.shape == (3, 224, 224)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "message"), [("resnet_x", "timm has no model 'resnet_x'"), ("resnet34.x", "tag")])
def test_an_unknown_timm_name(eqben, name, message):
    with pytest.raises(ValueError, match=message):
        module(eqben, objects(QUADS), transform=f"timm:{name}").setup("test")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An image processor and a tokenizer of transformers, as `save_pretrained` leaves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("pretrained")
    size = {"height": 24, "width": 24}
    CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "sits": 2, "stands": 3, "box": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=5, **names).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder / "unlimited")
    return folder


def test_a_transformers_name_gives_its_image_processor(eqben, picture, saved):
    found = image_of(module(eqben, objects(QUADS), transform=f"transformers:{saved}"))[0]
    resized = transforms.Resize((24, 24), transforms.InterpolationMode.BICUBIC)(transforms.PILToTensor()(picture))
    torch.testing.assert_close(found, (resized / 255 - 0.5) / 0.25, atol=0.05, rtol=0)


def test_a_transformers_name_gives_its_tokenizer(eqben, saved):
    data = module(eqben, objects(QUADS), tokenizer=f"transformers:{saved}")
    data.setup("test")
    first, second = data.test_dataloader()
    assert first["caption0"]["input_ids"].tolist() == [[2, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 4, 0, 0, 0]]
    assert first["caption1"]["attention_mask"].tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert second["caption0"]["input_ids"].shape == (1, 5)
    assert type(first["caption0"]) is dict
    long = module(eqben, objects([(*QUADS[0][:2], "sits " * 99, "box")]), tokenizer=f"transformers:{saved}")
    long.setup("test")
    assert next(iter(long.test_dataloader()))["caption0"]["input_ids"].tolist() == [[2] * 5]
    unlimited = module(eqben, objects(QUADS), tokenizer=f"transformers:{saved / 'unlimited'}")
    unlimited.setup("test")
    assert next(iter(unlimited.test_dataloader()))["caption0"]["input_ids"].shape == (3, 77)


def test_functions_are_taken_as_they_are(eqben):
    data = module(
        eqben,
        objects(QUADS),
        transform=lambda image: image,  # no tensor: listed
        tokenizer=lambda texts: torch.tensor([len(text) for text in texts]),
    )
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert [image.size for image in batch["image0"]] == [(6, 4)] * 3
    assert batch["caption1"].tolist() == [6, 4, 9]


@pytest.mark.parametrize("argument", ["transform", "tokenizer"])
def test_without_transformers_a_sentence_says_how_to_get_it(eqben, monkeypatch, argument):
    monkeypatch.setitem(sys.modules, "transformers", None)
    data = module(eqben, objects(QUADS), **{argument: "transformers:some/name"})
    message = f'{argument} "transformers:some/name" needs transformers.*pip install "lightning-methods\\[text\\]"'
    with pytest.raises(ModuleNotFoundError, match=message):
        image_of(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("written", "kind"),
    [("288", int), ("timm:resnet34", str), ("transformers:openai/clip-vit-base-patch32", str)],
)
def test_transforms_in_yaml(written, kind):
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    text = f"""
data:
  class_path: lightning_methods.datamodules.EqBenDataModule
  init_args: {{root: images, annotation: [a.json, b.json], transform: {written}, tokenizer: "transformers:x/y"}}
"""
    data = parser.instantiate_classes(parser.parse_string(text)).data
    assert type(data.transform) is kind
    assert str(data.transform) == written
    assert data.annotation == [Path("a.json"), Path("b.json")]


@pytest.mark.filterwarnings("ignore")
def test_a_function_in_yaml():
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    arguments = ["--data=lightning_methods.datamodules.EqBenDataModule", "--data.root=x", "--data.annotation=a.json"]
    data = parser.instantiate_classes(parser.parse_args([*arguments, "--data.transform=eqben_tree.pixels"])).data
    assert callable(data.transform)
