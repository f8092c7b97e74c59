"""`momatch prepare`: what it stores is what the pipeline itself says, and a run can be stopped anywhere."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import N
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import SIZE

from momatch import cli, load_data
from momatch.data.prepared import load_prepared
from momatch.data.rows import held_bytes
from momatch.interop.autoencoder import load_autoencoder
from momatch.interop.prepare import PrepareConfig, prepare
from momatch.utils.errors import UsageError
from momatch.utils.seeding import generator


def run(source, teacher, out, **options):
    config = PrepareConfig(str(teacher), **{"dtype": "float32", "shard_size": 40, **options})
    return list(prepare(str(source), config, out))


def pipeline_itself(folder, **parts):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(folder), **parts)


def picture(captioned, i):
    """(1, 3, 16, 16): the central square, averaged, by another way: Pillow's own fit."""
    from PIL import ImageOps

    image = Image.open(captioned / f"{i:03d}.png").convert("RGB")
    fitted = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1


def captions(captioned):
    return [json.loads(line)["text"] for line in (captioned / "metadata.jsonl").read_text().splitlines()]


CHOSEN = (0, 1, 4, 39, 40, 103)  # RGB, cut, grey; the ends of shards


@torch.no_grad()
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_latents_are_those_of_the_pipelines_own_vae_scaled_as_it_trains(prepared, pipelines, captioned, name):
    data, vae = load_prepared(prepared(name)), pipeline_itself(pipelines(name)).vae
    assert data.space == "latents" and tuple(data.images.shape) == (N, 4, 8, 8) and len(data.labels) == N
    for i in CHOSEN:
        posterior = vae.encode(picture(captioned, i)).latent_dist
        noise = torch.randn((4, 8, 8), generator=generator(0, "posterior", i))
        drawn = posterior.mean + posterior.std * noise
        want = (drawn - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        torch.testing.assert_close(data.images[i], want[0], rtol=1e-4, atol=1e-5)
        assert int(data.labels[i]) == i % 2


@torch.no_grad()
def test_the_mean_of_the_posterior_can_be_kept(pipelines, captioned, tmp_path):
    run(captioned, pipelines("stable_diffusion"), tmp_path / "out", posterior="mean", image_size=SIZE)
    vae = pipeline_itself(pipelines("stable_diffusion")).vae
    want = vae.encode(picture(captioned, 4)).latent_dist.mean[0] * vae.config.scaling_factor
    torch.testing.assert_close(load_prepared(tmp_path / "out").images[4], want, rtol=1e-4, atol=1e-5)


def asked_of_the_pipeline(name, pipe, prompt):
    """(conditions of a prompt, null condition), from a plain call of encode_prompt."""
    if name == "flux":
        (asked, pooled, _), (unasked, unpooled, _) = (pipe.encode_prompt(text, None) for text in (prompt, ""))
        return (
            {"encoder_hidden_states": asked, "pooled_projections": pooled},
            {"encoder_hidden_states": unasked, "pooled_projections": unpooled},
        )
    if name == "pixart":
        asked, mask, unasked, unmask = pipe.encode_prompt(prompt)
        return (
            {"encoder_hidden_states": asked, "encoder_attention_mask": mask},
            {"encoder_hidden_states": unasked, "encoder_attention_mask": unmask},
        )
    if name == "stable_diffusion":
        asked, unasked = pipe.encode_prompt(prompt, torch.device("cpu"), 1, True)
        return {"encoder_hidden_states": asked}, {"encoder_hidden_states": unasked}
    more = (None, None) if name.startswith("stable_diffusion_3") else (None,)
    asked, unasked, pooled, unpooled = pipe.encode_prompt(prompt, *more)
    if name.startswith("stable_diffusion_3"):
        return (
            {"encoder_hidden_states": asked, "pooled_projections": pooled},
            {"encoder_hidden_states": unasked, "pooled_projections": unpooled},
        )
    size = (SIZE, SIZE)
    ids = pipe._get_add_time_ids(size, (0, 0), size, torch.float32, pipe.text_encoder_2.config.projection_dim)
    return (
        {"encoder_hidden_states": asked, "text_embeds": pooled, "time_ids": ids},
        {"encoder_hidden_states": unasked, "text_embeds": unpooled, "time_ids": ids},
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["stable_diffusion", "stable_diffusion_xl", "pixart", "stable_diffusion_3", "flux"]
)
def test_prompts_are_encoded_as_the_pipeline_encodes_them(prepared, pipelines, captioned, name):
    data, pipe = load_prepared(prepared(name)), pipeline_itself(pipelines(name))
    texts = captions(captioned)
    assert list(data.captions) == texts
    for i in CHOSEN:
        asked, nulls = asked_of_the_pipeline(name, pipe, texts[i])
        assert set(data.conditions) == set(asked) == set(data.null_condition)
        for key, value in asked.items():
            torch.testing.assert_close(data.conditions[key][i], value[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(data.null_condition[key], nulls[key][0], rtol=1e-4, atol=1e-5)
    states = data.conditions["encoder_hidden_states"]
    assert not torch.allclose(states[0], states[1], atol=1e-3), "prompts make a difference"


@torch.no_grad()
def test_xl_guides_away_from_an_empty_prompt_if_its_config_says_so(pipelines):
    from momatch.interop.pipelines import load_encoders
    from momatch.interop.prompts import null_condition

    zeros, empty = (
        null_condition(load_encoders(pipelines("stable_diffusion_xl", zeros=z)), SIZE) for z in (True, False)
    )
    assert not zeros["text_embeds"].any() and not zeros["encoder_hidden_states"].any()
    pipe = pipeline_itself(pipelines("stable_diffusion_xl", zeros=False))
    want = pipe.encode_prompt("", None)[0][0]
    torch.testing.assert_close(empty["encoder_hidden_states"], want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_stable_diffusion_3_without_its_t5(pipelines):
    """Its encode_prompt asks the network, which is not loaded, how wide embeddings are."""
    from momatch.interop.pipelines import load_encoders
    from momatch.interop.prompts import encode_prompts

    folder = pipelines("stable_diffusion_3", t5=False)
    found = encode_prompts(load_encoders(folder), ["a red square", "of"])
    pipe = pipeline_itself(folder, text_encoder_3=None, tokenizer_3=None)
    want, _, pooled, _ = pipe.encode_prompt(["a red square", "of"], None, None)
    torch.testing.assert_close(found["encoder_hidden_states"], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pooled_projections"], pooled, rtol=1e-4, atol=1e-5)


def test_decoding_is_the_pipelines_own_and_undoes_the_scale(prepared, pipelines):
    for name in ("stable_diffusion", "stable_diffusion_3"):
        latents, vae = load_prepared(prepared(name)).images[:3], pipeline_itself(pipelines(name)).vae
        with torch.no_grad():
            inner = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
            want = vae.decode(inner).sample.clamp(-1, 1)
        autoencoder = load_autoencoder(pipelines(name))
        torch.testing.assert_close(autoencoder.decode(latents), want, rtol=1e-4, atol=1e-5)
    assert load_autoencoder(pipelines("pixels")) is None


@torch.no_grad()
def test_latents_with_a_mean_and_spread_of_each_channel():
    """As Playground's: the pipeline decodes latents·std/scale + mean."""
    from tiny_pipelines import vae

    from momatch.interop.autoencoder import Autoencoder

    inner = vae()
    mean, std = [0.1, -0.2, 0.3, 0.0], [2.0, 1.0, 0.5, 3.0]
    inner.register_to_config(latents_mean=mean, latents_std=std)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = Autoencoder(inner).encode(images)
    as_pipeline = latents * torch.tensor(std).view(1, 4, 1, 1) / 0.5 + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(as_pipeline, inner.encode(images).latent_dist.mean, rtol=1e-4, atol=1e-5)
    want = inner.decode(as_pipeline).sample.clamp(-1, 1)
    torch.testing.assert_close(Autoencoder(inner).decode(latents), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_autoencoder_without_a_distribution(tmp_path):
    """Sana's: the encoder gives latents and no mean or spread, its stride is 4 here."""
    from diffusers import AutoencoderDC

    from momatch.interop.autoencoder import load_autoencoder

    sides = dict(attention_head_dim=4, latent_channels=4, scaling_factor=0.4)
    blocks = dict(
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )
    AutoencoderDC(**sides, **blocks).save_pretrained(tmp_path / "vae")
    found = load_autoencoder(tmp_path)
    assert found is not None
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    plain = found.vae.encode(images).latent
    latents = found.encode(images, lambda shape: pytest.fail("there is nothing to draw"))
    assert latents.shape == (2, 4, 4, 4)
    torch.testing.assert_close(latents, plain * 0.4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.decode(latents), found.vae.decode(plain).sample.clamp(-1, 1), atol=1e-5, rtol=1e-4
    )


def test_a_pipeline_without_encoders_keeps_pictures_as_they_are(pipelines, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (N, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", images=images, labels=np.arange(N) % 3)
    run(tmp_path / "grey.npz", pipelines("pixels"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "shard-00001.safetensors")["images"]
    assert stored.dtype == torch.uint8 and np.array_equal(stored[3, 2].numpy(), images[43])
    data = load_data(str(tmp_path / "out"))
    assert data.train.space == "pixels" and data.train.num_classes == 3 and data.train.captions is None
    assert data.train.images.shape[1:] == (3, 8, 8) and held_bytes(data.train.images) == 0
    whole = load_prepared(tmp_path / "out")
    want = torch.from_numpy(images).float()[:, None].expand(N, 3, 8, 8) / 127.5 - 1
    assert torch.equal(whole.images[:], want) and not whole.conditions


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != ".lock"}


def test_a_stopped_run_goes_on_at_the_next_shard_and_ends_with_the_same_bytes(pipelines, captioned, tmp_path):
    teacher = pipelines("stable_diffusion")
    run(captioned, teacher, tmp_path / "whole", shard_size=32, batch_size=8)
    config = PrepareConfig(str(teacher), dtype="float32", shard_size=32, batch_size=8)
    steps = prepare(str(captioned), config, tmp_path / "stopped")
    for done in steps:
        if done.samples >= 56:
            break
    steps.close()
    assert not (tmp_path / "stopped" / "index.json").exists()
    assert [f.name for f in sorted((tmp_path / "stopped").glob("*.safetensors"))] == [
        "null-condition.safetensors",
        "shard-00000.safetensors",
    ]
    with pytest.raises(UsageError, match="stopped is not finished"):
        load_data(str(tmp_path / "stopped"))
    first = (tmp_path / "stopped" / "shard-00000.safetensors").stat().st_mtime_ns
    resumed = run(captioned, teacher, tmp_path / "stopped", shard_size=32, batch_size=8)
    assert resumed[0].samples == 32 and resumed[-1].samples == resumed[-1].total == N
    assert resumed[-1].new == N - 32
    assert (tmp_path / "stopped" / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    again = run(captioned, teacher, tmp_path / "stopped", shard_size=32, batch_size=8)
    assert [done.new for done in again] == [0]


def test_a_damaged_shard_is_named_and_made_again(prepared, pipelines, captioned, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(prepared("stable_diffusion"), folder)
    shard = folder / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(UsageError, match="the shard .*shard-00001.safetensors is missing or damaged"):
        load_data(str(folder))
    done = run(captioned, pipelines("stable_diffusion"), folder, image_size=SIZE)
    assert shard.read_bytes() == whole and done[-1].new == 40
    shard.unlink()
    with pytest.raises(UsageError, match="the shard .*shard-00001.safetensors is missing or damaged"):
        load_data(str(folder))
    run(captioned, pipelines("stable_diffusion"), tmp_path / "other", image_size=SIZE, seed=1)
    shutil.copy(tmp_path / "other" / shard.name, shard)
    run(captioned, pipelines("stable_diffusion"), folder, image_size=SIZE)
    assert shard.read_bytes() == whole, "one that was made with other settings does not count"


def test_captions_that_are_lost_are_named_when_they_are_read(prepared, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(prepared("stable_diffusion"), folder)
    (folder / "shard-00002.json").write_text("[]")
    data = load_prepared(folder)
    assert data.captions[39]
    with pytest.raises(UsageError, match="shard-00002.json are missing or damaged"):
        data.captions[100]


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "other"}', '{"format": "momatch-data-1"}'])
def test_a_damaged_index_is_one_sentence(prepared, tmp_path, damage):
    folder = tmp_path / "data"
    shutil.copytree(prepared("stable_diffusion"), folder)
    (folder / "index.json").write_text(damage)
    with pytest.raises(UsageError, match="index.json is damaged") as error:
        load_data(str(folder))
    assert "\n" not in str(error.value)


def test_batches_do_not_matter_and_seeds_do(pipelines, captioned, tmp_path):
    teacher = pipelines("stable_diffusion")
    for name, options in {"a": {"batch_size": 3}, "b": {"batch_size": 40}, "c": {"seed": 1}}.items():
        run(captioned, teacher, tmp_path / name, **options)
    a, b, c = (load_prepared(tmp_path / name).images[:] for name in "abc")
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(a, c, atol=1e-3)


def test_half_precision_is_what_is_stored_by_default(pipelines, captioned, prepared, tmp_path):
    config = PrepareConfig(str(pipelines("stable_diffusion")))
    for _ in prepare(str(captioned), config, tmp_path / "half"):
        pass
    stored = load_file(tmp_path / "half" / "shard-00000.safetensors")
    assert stored["latents"].dtype == stored["encoder_hidden_states"].dtype == torch.float16
    half, full = load_prepared(tmp_path / "half"), load_prepared(prepared("stable_diffusion"))
    assert half.images[:].dtype == half.null_condition["encoder_hidden_states"].dtype == torch.float32
    torch.testing.assert_close(half.images[:], full.images[:], rtol=2e-3, atol=2e-3)


def say(*arguments, capsys):
    code = cli.main([str(a) for a in arguments])
    return code, capsys.readouterr()


def test_the_command_prepares_resumes_and_refuses_another_config(pipelines, captioned, tmp_path, capsys):
    command = ["prepare", captioned, "--out", tmp_path / "out", "--teacher", pipelines("stable_diffusion")]
    code, said = say(*command, capsys=capsys)
    assert code == 0 and "Data:" in said.out and said.err == ""
    before = contents(tmp_path / "out")
    code, said = say(*command, capsys=capsys)
    assert code == 0 and f"{N} of {N} samples are there already" in said.out
    for more in (["--image-size", "32"], ["--dtype", "float32"], ["--seed", "3"], ["--shard-size", "10"]):
        code, said = say(*command, *more, capsys=capsys)
        assert code == 2 and "was prepared from other data or settings" in said.err, more
    command[-1] = pipelines("stable_diffusion", seed=9)
    capsys.readouterr()
    code, said = say(*command, capsys=capsys)
    assert code == 2 and "(encoders '" in said.err and said.err.count("\n") == 1
    assert contents(tmp_path / "out") == before


def bad(kind, tmp_path, pipelines, captioned, monkeypatch, request):
    """(arguments of prepare, what is said)."""
    source, teacher, out = captioned, pipelines("stable_diffusion"), tmp_path / "out"
    if kind == "no text encoder":
        return [
            source,
            out,
            pipelines("pixels"),
        ], "has captions, but the pipeline .* has no text encoder; use"
    if kind in ("no captions", "no captions in metadata"):
        folder = tmp_path / "plain"
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "a.png")
        if kind == "no captions in metadata":
            (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "words": "of"}\n')
            return [folder, out, teacher], "has no captions: its metadata.jsonl has file_name, words, none of"
        return [folder, out, teacher], "has no captions: this kind of source has none: use a folder with"
    if kind == "no pipeline":
        return [source, out, tmp_path], "is no folder of a diffusers pipeline .no model_index.json"
    if kind == "unwritable":
        (tmp_path / "file").write_text("")
        return [source, tmp_path / "file" / "out", teacher], "cannot write into .*file/out"
    if kind == "not empty":
        out.mkdir()
        (out / "mine.txt").write_text("")
        return [source, out, teacher], "is not empty and holds no prepared data"
    if kind == "size":
        return [source, out, teacher, "--image-size", "15"], "one latent of 2×2 pixels; use 1[46]"
    if kind == "batch":
        return [source, out, teacher, "--batch-size", "0"], "batch_size is 0; it must be at least 1"
    if kind == "prepared already":
        out.mkdir()
        (out / "prepare.json").write_text("{}")
        return [out, tmp_path / "other", teacher], "needs no preparation"
    if kind == "digits":
        return ["digits", out, teacher], "'digits' needs no preparation"
    if kind == "flux size":
        return [source, out, pipelines("flux")], "does not say how large its pictures are; give --image-size"
    if kind == "no diffusers":
        monkeypatch.setitem(sys.modules, "diffusers", None)
        return [source, out, teacher], r"diffusers is not installed; pip install 'momatch\[diffusers\]'"
    if kind == "another process":
        from filelock import FileLock

        out.mkdir()
        lock = FileLock(out / ".lock")
        lock.acquire()
        request.addfinalizer(lock.release)
        return [source, out, teacher], "another process is preparing"
    unreadable = tmp_path / "weights"
    shutil.copytree(teacher, unreadable)
    (unreadable / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"hello")
    return [source, out, unreadable], "cannot load the encoders of"


@pytest.mark.parametrize(
    "kind",
    [
        "no text encoder", "no captions", "no captions in metadata", "no pipeline", "unwritable", "not empty",
        "size", "batch", "prepared already", "digits", "flux size", "no diffusers", "another process",
        "damaged weights",
    ],
)  # fmt: skip
def test_what_cannot_be_prepared_is_said_in_one_sentence(
    kind, tmp_path, pipelines, captioned, monkeypatch, request, capsys
):
    (source, out, teacher, *more), says = bad(kind, tmp_path, pipelines, captioned, monkeypatch, request)
    capsys.readouterr()
    code, said = say("prepare", source, "--out", out, "--teacher", teacher, *more, capsys=capsys)
    assert code == 2 and said.err.count("\n") == 1, said.err
    with pytest.raises(UsageError, match=says):
        raise UsageError(said.err)


def test_a_bad_picture_in_the_middle_loses_no_finished_shard(pipelines, captioned, tmp_path, capsys):
    source = tmp_path / "pictures"
    shutil.copytree(captioned, source)
    broken = source / "090.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:70] + bytes(len(whole) - 70))
    arguments = ["prepare", source, "--out", tmp_path / "out", "--teacher", pipelines("stable_diffusion")]
    code, said = say(*arguments, "--shard-size", "40", capsys=capsys)
    assert code == 2 and "cannot read the picture" in said.err and "090.png" in said.err
    assert (tmp_path / "out" / "shard-00001.safetensors").is_file()
    broken.write_bytes(whole)
    code, said = say(*arguments, "--shard-size", "40", capsys=capsys)
    assert code == 0 and f"80 of {N} samples are there already" in said.out


def test_values_that_half_precision_cannot_hold_are_refused(pipelines, captioned, tmp_path):
    from diffusers import AutoencoderKL

    folder = tmp_path / "loud"
    shutil.copytree(pipelines("stable_diffusion"), folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.register_to_config(scaling_factor=1e7)
    vae.save_pretrained(folder / "vae")
    with pytest.raises(UsageError, match="latents has values that float16 cannot hold; use --dtype float32"):
        run(captioned, folder, tmp_path / "out", dtype="float16")
