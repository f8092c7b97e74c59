"""The record of a class that momatch does not know yet, with everything that its author has to say."""

from __future__ import annotations

from collections.abc import Sequence

FILE = '''"""{class_name}."""

from momatch.networks.families.family import Asked, Family, needed


def call(model, z, time, cond):
    """z (B, C, …), time (B,) → (B, C, …), by one call of the network, as its pipeline makes it."""
    {given} = needed(cond, {names})
    return model(z, timestep=time, {arguments}, return_dict=False)[0]


FAMILY = Family(
    "{class_name}",
    call,
    # config.json → the shape of one sample's part of each of these; -1 where any length will do
    asked=lambda config: Asked({{{shapes}}}),
    arguments={{{pipeline}}},  # what its pipeline's call names them
    prompts={{}},  # its pipeline's class → (pipeline, prompts, null, image_size) → {{name: (B, …)}}
    # sides=lambda config: (config["sample_size"],) * 2,  # or (T, H, W) with dims=3, (T,) with dims=1
    # channels=lambda config: (config["in_channels"], config["in_channels"]),  # taken, and given
    # packed=4,  # so many of these are one channel of z, where tokens are patches of 2×2 made outside
    # time_unit=1000,  # its pipeline divides timesteps by that
    # negated=True,  # its pipeline changes the sign of what it gives
)
'''
TEXT = ("encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_mask")


def filled_in(class_name: str, arguments: Sequence[str]) -> str:
    """The file for a class whose forward takes these arguments, beside the sample and the timestep."""
    names = [name for name in arguments if name in TEXT or "embed" in name or "mask" in name] or [
        *arguments[:1]
    ]
    return FILE.format(
        class_name=class_name,
        given=", ".join(names) + ("," if len(names) == 1 else ""),
        names=", ".join(f'"{name}"' for name in names),
        arguments=", ".join(f"{name}={name}" for name in names),
        shapes=", ".join(f'"{name}": (-1,)' for name in names),
        pipeline=", ".join(f'"{name}": "prompt_embeds"' for name in names[:1]),
    )
