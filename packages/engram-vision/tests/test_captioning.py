"""Captions by image-to-text models: small ones of every kind, with random weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from engram_core import InputError, Watcher
from engram_vision import captioning
from engram_vision.caption_files import CaptionFolder
from engram_vision.captioning import PROMPT, CaptionSettings, caption_folder, load_captioner
from engram_vision.quiet import quiet_libraries

SIDE = 32
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<image>"]
WORDS = ["a", "photo", "of", "the", "red", "blue", "man", "woman", "monster", "hat", "lamp", "snow", "sea", "in", "on"]
WORDS += ["with", "and", ".", "Describe", "this", "picture"]
IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
LOOK = {"image_size": SIDE, "patch_size": 8}
SQUARE = {"height": SIDE, "width": SIDE}
TEMPLATE = (
    "[CLS] {% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}.{% endif %}"
)


def build_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[CLS]",
        eos_token="[SEP]",
        extra_special_tokens={"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def build_blip():
    vocab_size = len(SPECIAL + WORDS)
    text = {**SMALL, **IDS, "num_hidden_layers": 1, "encoder_hidden_size": 16, "max_position_embeddings": 64}
    config = BlipConfig(
        text_config={**text, "vocab_size": vocab_size, "sep_token_id": 3, "initializer_range": 1.0},
        vision_config={**SMALL, **LOOK, "num_hidden_layers": 1, "initializer_range": 1.0},
        projection_dim=16,
    )
    return BlipForConditionalGeneration(config), BlipProcessor(BlipImageProcessor(size=SQUARE), build_tokenizer())


def build_git():
    config = GitConfig(
        vision_config={**SMALL, **LOOK, "num_hidden_layers": 1},
        vocab_size=len(SPECIAL + WORDS),
        num_hidden_layers=1,
        max_position_embeddings=64,
        initializer_range=1.0,
        **SMALL,
        **IDS,
    )
    model = GitForCausalLM(config)
    model.output.bias.data[: len(SPECIAL)] = -1e4  # it never stops by itself
    return model, GitProcessor(CLIPImageProcessor(size=SQUARE, crop_size=SQUARE), build_tokenizer())


def build_llava():
    text = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        num_hidden_layers=1,
        num_key_value_heads=2,
        initializer_range=1.0,
        **SMALL,
        **IDS,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(num_hidden_layers=2, initializer_factor=20.0, **SMALL, **LOOK),
        text_config=text,
        image_token_index=4,
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size=SQUARE, crop_size=SQUARE),
        build_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


class Pair:
    """The files of an encoder and a decoder, for which transformers has no processor."""

    def __init__(self, *parts):
        self.parts = parts

    def save_pretrained(self, folder):
        for part in self.parts:
            part.save_pretrained(folder)


def build_pair():
    decoder = GPT2Config(
        vocab_size=len(SPECIAL + WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=1.0
    )
    encoder = ViTConfig(num_hidden_layers=1, **SMALL, **LOOK)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = VisionEncoderDecoderModel(config)
    for name, value in {"decoder_start_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    return model, Pair(ViTImageProcessor(size=SQUARE), build_tokenizer())


BUILDERS = {"blip": build_blip, "git": build_git, "llava": build_llava, "pair": build_pair}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, one_thread):
    def build(name):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        with quiet_libraries():
            for part in BUILDERS[name]():
                part.save_pretrained(folder)
        return str(folder)

    folders = {name: build(name) for name in BUILDERS}
    return folders.__getitem__


def draw(number):
    pixels = np.random.default_rng(number).integers(0, 256, (20 + 7 * number, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


IMAGES = [draw(number) for number in range(5)]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(IMAGES):
        image.save(folder / f"{number}.png")
    return folder


def refusal(action, *arguments, **options):
    with pytest.raises(InputError) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable()
    return message


# Models


@pytest.mark.parametrize("name", BUILDERS)
def test_a_model_of_each_kind_describes_pictures(folder_of, name):
    captioner = load_captioner(folder_of(name))
    texts = [captioner.describe([image], max_new_tokens=8)[0] for image in IMAGES]
    assert len(set(texts)) > 1
    for text in texts:
        assert len(text.split()) <= 8
        assert set(text.split()) <= {*WORDS, "[UNK]"}
    assert captioner.describe(IMAGES, max_new_tokens=8) == texts
    (short,) = captioner.describe(IMAGES[:1], max_new_tokens=2)
    assert texts[0].startswith(short)
    assert len(short.split()) <= 2


@pytest.mark.parametrize("name", ["blip", "git", "llava"])
def test_captions_are_those_of_the_model_by_hand(folder_of, name):
    with quiet_libraries():
        model = AutoModelForImageTextToText.from_pretrained(folder_of(name))
        processor = AutoProcessor.from_pretrained(folder_of(name))
        for image in IMAGES[:3]:
            if name == "llava":
                content = [{"type": "image", "image": image}, {"type": "text", "text": PROMPT}]
                chat = [{"role": "user", "content": content}]
                how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
                inputs = processor.apply_chat_template(chat, **how)
            else:
                inputs = processor(images=image, return_tensors="pt")
            (ids,) = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            text = processor.decode(
                ids[inputs["input_ids"].shape[1] if name == "llava" else 0 :], skip_special_tokens=True
            )
            assert load_captioner(folder_of(name)).describe([image], 8) == [" ".join(text.split())]


@pytest.mark.parametrize("name", ["blip", "git"])
def test_captioners_go_on_from_the_prompt(folder_of, name):
    plain, opened = load_captioner(folder_of(name)), load_captioner(folder_of(name), prompt=" a photo \n of ")
    before, after = plain.describe(IMAGES, 8), opened.describe(IMAGES, 8)
    assert any(after)
    for text in filter(None, after):
        assert text.startswith("a photo of ")
        assert not text.startswith("a photo of a photo of")
    assert opened.describe(IMAGES[-1:], 8) == after[-1:]
    assert before != [text.removeprefix("a photo of ") for text in after]


def test_an_opening_is_kept_as_the_user_spells_it(folder_of):
    (text,) = load_captioner(folder_of("git"), prompt="a  Photograph of").describe(IMAGES[:1], 8)
    assert text.startswith("a Photograph of ")
    assert len(text.split()) <= 3 + 8


def test_a_chat_model_is_asked_the_prompt_and_does_not_repeat_it(folder_of):
    usual, asked = (
        load_captioner(folder_of("llava")),
        load_captioner(folder_of("llava"), prompt="the hat in this photo"),
    )
    assert usual.prompt == f"[CLS] user <image> {PROMPT} ."
    assert asked.prompt == "[CLS] user <image> the hat in this photo ."
    assert usual.describe(IMAGES, 8) != asked.describe(IMAGES, 8)
    for text in asked.describe(IMAGES, 8):
        assert "the hat in this photo" not in text


def test_precision(folder_of):
    captioner = load_captioner(folder_of("llava"), precision="bf16")
    assert captioner.model.dtype == torch.bfloat16
    assert len(captioner.describe(IMAGES[:2], 4)) == 2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("./absent", "./absent: does not exist; give a hub id, or a folder"),
        ("a/b/c", "a/b/c: does not exist"),
        ("nobody/nothing-here", "nobody/nothing-here: cannot be loaded as an image-to-text model"),
    ],
)
def test_a_captioner_that_is_not_there_is_refused(name, told):
    assert told in refusal(load_captioner, name)


def test_a_captioner_that_is_none_is_refused(tmp_path, folder_of):
    file = tmp_path / "file"
    file.write_text("no model")
    assert refusal(load_captioner, str(file)) == f"{file}: is a file; give a hub id, or a folder in transformers layout"
    with quiet_libraries():
        LlamaConfig(num_hidden_layers=1, **SMALL).save_pretrained(tmp_path / "llama")
    message = refusal(load_captioner, str(tmp_path / "llama"))
    assert message.startswith(f"{tmp_path / 'llama'}: cannot be loaded as an image-to-text model: ValueError: ")
    assert "hub" not in message.removeprefix(str(tmp_path))[-40:]


def test_missing_weights_are_refused(tmp_path):
    torch.manual_seed(0)
    model, processor = build_git()
    with quiet_libraries():
        processor.save_pretrained(tmp_path)
        model.save_pretrained(
            tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "image_encoder" not in k}
        )
    message = refusal(load_captioner, str(tmp_path))
    assert "of its weights are missing, e.g. git.image_encoder" in message


def test_a_prompt_that_cannot_be_given_is_refused(folder_of):
    assert "take no prompt; leave --prompt out" in refusal(load_captioner, folder_of("pair"), prompt="a photo of")


def test_what_the_model_cannot_do_is_one_line(folder_of, monkeypatch):
    captioner = load_captioner(folder_of("git"))

    def fail(**options):
        raise RuntimeError("shapes [1]\nand [2]")

    monkeypatch.setattr(captioner.model, "generate", fail)
    assert refusal(captioner.describe, IMAGES[:1]) == (
        f"{captioner.name}: cannot describe pictures: RuntimeError: shapes [1] and [2]; "
        "some models need a prompt (--prompt)"
    )

    def overflow(**options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(captioner.model, "generate", overflow)
    assert "not enough memory for 2 pictures at once; lower the batch size" in refusal(captioner.describe, IMAGES[:2])


# Folders


def settings_for(folder, captioner="git", **options):
    return CaptionSettings(folder=folder, captioner=captioner, max_new_tokens=6, device="cpu", **options)


def read(folder):
    return CaptionFolder(folder, incomplete=True).captions


@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_picture_gets_a_caption(pictures, folder_of, batch_size):
    heard = {}
    settings = settings_for(pictures, folder_of("git"), write=True, batch_size=batch_size)
    report = caption_folder(settings, heard=heard.__setitem__)
    expected = load_captioner(folder_of("git")).describe(IMAGES, 6)
    assert report.captions == dict(zip([f"{number}.png" for number in range(5)], expected, strict=True))
    assert heard == report.captions == read(pictures)
    assert (report.form, report.kept, report.silent) == ("txt", (), ())
    assert report.written == tuple(pictures / f"{number}.txt" for number in range(5))


def test_nothing_is_written_unasked(pictures, folder_of):
    before = sorted(pictures.iterdir())
    report = caption_folder(settings_for(pictures, folder_of("git")))
    assert len(report.captions) == 5
    assert report.written == ()
    assert sorted(pictures.iterdir()) == before


def test_captions_that_exist_are_kept_unless_told(pictures, folder_of):
    (pictures / "1.txt").write_text("mine\n")
    (pictures / "3.txt").write_text(" \n")
    report = caption_folder(settings_for(pictures, folder_of("git"), write=True))
    assert report.kept == ("1.png",)
    assert sorted(report.captions) == ["0.png", "2.png", "3.png", "4.png"]
    assert (pictures / "1.txt").read_text() == "mine\n"
    again = caption_folder(settings_for(pictures, "no/model", write=True))
    assert (again.captions, len(again.kept)) == ({}, 5)
    over = caption_folder(settings_for(pictures, folder_of("git"), write=True, overwrite=True))
    assert over.kept == ()
    assert read(pictures)["1.png"] == over.captions["1.png"] != "mine"


def test_captions_go_where_the_folder_has_them(pictures, folder_of):
    (pictures / "metadata.jsonl").write_text(
        '{"file_name": "2.png", "seed": 1.0}\n{"file_name": "1.png", "text": "mine"}\n'
    )
    report = caption_folder(settings_for(pictures, folder_of("git"), write=True))
    assert report.form == "metadata.jsonl"
    assert report.written == (pictures / "metadata.jsonl",)
    assert list(read(pictures)) == ["2.png", "1.png", "0.png", "3.png", "4.png"]
    assert read(pictures) == {**report.captions, "1.png": "mine"}
    assert not list(pictures.glob("*.txt"))


class Stopping:
    """A captioner that the user stops at the third picture."""

    def __init__(self, stop=True):
        self.stop, self.seen = stop, []

    def describe(self, images, max_new_tokens):
        if self.stop and len(self.seen) == 2:
            raise KeyboardInterrupt
        self.seen += [image.size for image in images]
        return [f"a picture of {image.height} lines" for image in images]


def test_a_run_that_was_stopped_goes_on_where_it_was(pictures, monkeypatch):
    first, second = Stopping(), Stopping(stop=False)
    monkeypatch.setattr(captioning, "load_captioner", lambda *names, **options: first)
    heard = []
    with pytest.raises(KeyboardInterrupt):
        caption_folder(settings_for(pictures, write=True), heard=lambda name, text: heard.append(name))
    assert heard == ["0.png", "1.png"]
    assert {name for name, text in read(pictures).items() if text} == {"0.png", "1.png"}
    monkeypatch.setattr(captioning, "load_captioner", lambda *names, **options: second)
    report = caption_folder(settings_for(pictures, write=True))
    assert report.kept == ("0.png", "1.png")
    assert second.seen == [image.size for image in IMAGES[2:]]
    assert read(pictures) == {f"{i}.png": f"a picture of {image.height} lines" for i, image in enumerate(IMAGES)}


def test_each_caption_is_on_disk_before_the_next_is_made(pictures, monkeypatch):
    class Looking(Stopping):
        def describe(self, images, max_new_tokens):
            assert len(list(pictures.glob("*.txt"))) == len(self.seen)
            return super().describe(images, max_new_tokens)

    looking = Looking(stop=False)
    monkeypatch.setattr(captioning, "load_captioner", lambda *names, **options: looking)
    caption_folder(settings_for(pictures, write=True))
    assert len(looking.seen) == 5


def test_a_silent_captioner_leaves_no_caption(pictures, monkeypatch):
    class Silent:
        def describe(self, images, max_new_tokens):
            return ["" if image.size == IMAGES[1].size else "a picture" for image in images]

    monkeypatch.setattr(captioning, "load_captioner", lambda *names, **options: Silent())
    report = caption_folder(settings_for(pictures, write=True, batch_size=3))
    assert report.silent == ("1.png",)
    assert len(report.captions) == 4
    assert not (pictures / "1.txt").exists()


def test_the_watcher_hears_how_it_goes(pictures, folder_of):
    class Hearing(Watcher):
        def __init__(self):
            self.heard = []

        def begin(self, title, total=None, done=0):
            self.heard.append((title.split()[0], total))

        def advance(self, done, figures=None):
            self.heard.append(done)

    watcher = Hearing()
    caption_folder(settings_for(pictures, folder_of("git"), batch_size=2), watcher=watcher)
    assert watcher.heard == [("checking", 5), 1, 2, 3, 4, 5, ("loading", None), ("captioning", 5), 2, 4, 5]


def test_a_damaged_picture_is_refused_before_any_caption_is_made(pictures):
    (pictures / "4.png").write_bytes((pictures / "4.png").read_bytes()[:200])
    message = refusal(caption_folder, settings_for(pictures, "no/model", write=True))
    assert message.startswith(f"{pictures / '4.png'}: ")
    (pictures / "4.txt").write_text("has a caption, so nobody looks at it")
    (pictures / "0.txt").write_text("x")
    assert "no/model: cannot be loaded" in refusal(caption_folder, settings_for(pictures, "no/model", write=True))


def test_wrong_settings_are_refused(pictures):
    settings = settings_for(pictures)
    assert refusal(caption_folder, replace(settings, batch_size=0)) == "batch_size is 0, expected at least 1"
    assert refusal(caption_folder, replace(settings, max_new_tokens=-1)) == "max_new_tokens is -1, expected at least 1"
    assert "precision fp16 needs a GPU" in refusal(caption_folder, replace(settings, precision="fp16"))


# Clips


@pytest.fixture
def clip(pictures):
    """A clip whose third frame of five is the only one that is not black."""
    clips = pytest.importorskip("engram_video.clips", exc_type=ImportError)
    frames = np.zeros((5, 64, 48, 3), dtype=np.uint8)
    frames[2] = 200
    clips.write_clip(pictures / "clip.mp4", frames, 8)
    return pictures / "clip.mp4"


class Bright:
    """Tells how bright a picture is."""

    def describe(self, images, max_new_tokens):
        return [f"{image.size} {round(np.asarray(image).mean() / 100)}" for image in images]


def test_of_a_clip_the_middle_frame_is_described(pictures, clip, monkeypatch):
    monkeypatch.setattr(captioning, "load_captioner", lambda *names, **options: Bright())
    frames = [Image.new("RGB", (48, 64), (value,) * 3) for value in (10, 20, 30, 200, 40, 50)]
    frames[0].save(pictures / "moving.gif", save_all=True, append_images=frames[1:], duration=100)
    frames[3].save(pictures / "still.gif")
    report = caption_folder(settings_for(pictures, write=True))
    assert [report.captions[name] for name in ("clip.mp4", "moving.gif", "still.gif")] == ["(48, 64) 2"] * 3
    assert (pictures / "clip.txt").read_text() == "(48, 64) 2\n"


def test_a_damaged_clip_is_refused(pictures, clip):
    clip.write_bytes(b"no clip")
    assert refusal(caption_folder, settings_for(pictures, "no/model")).startswith(f"{clip}: ")


def test_clips_need_the_video_package(pictures, monkeypatch):
    (pictures / "clip.mp4").write_bytes(b"a clip")
    monkeypatch.setattr(captioning, "find_spec", lambda name: None)
    message = refusal(caption_folder, settings_for(pictures))
    assert message == (
        f"{pictures / 'clip.mp4'}: is a clip, which only engram-video can read; install it from this repository, "
        "or take the clip out of the folder"
    )
