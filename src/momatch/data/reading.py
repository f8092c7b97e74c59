"""How a source of pictures is read, where its files alone do not say it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from momatch.utils.settings import Remedy, require, settings

AtLeast0 = Annotated[int, Field(ge=0), Remedy("it must be at least 1, or left out")]
RowLength = Annotated[int, Field(ge=2, le=4096), Remedy("use 2 to 4096")]


@settings()
class Reading:
    """How a source is read.

    Attributes:
        caption_field: which entry of a picture's record is its caption; "" looks for the usual names.
        label_field: which is its label.
        num_classes: how many classes there are, where labels are some of a larger set; 0 counts them.
        renumber_labels: labels that are some of a larger set are numbered anew, from 0, in their order.
        empty_captions: pictures without a caption have the empty one, where others have theirs.
        max_megapixels: million pixels of a picture that are read at most; 0 is Pillow's limit, about 179.
        anywhere: metadata may name pictures outside their folder.
        skip_unreadable: up to so many pictures that cannot be read are left out and named; 0 refuses the
            first. All are opened once before anything else is done with them.
        row_length: tokens in a row of a text.
        tokens: what a token of a text is: one of its "characters", or of its "bytes".
    """

    caption_field: str = ""
    label_field: str = ""
    num_classes: AtLeast0 = 0
    renumber_labels: bool = False
    empty_captions: bool = False
    max_megapixels: AtLeast0 = 0
    anywhere: bool = False
    skip_unreadable: AtLeast0 = 0
    row_length: RowLength = 64
    tokens: Literal["characters", "bytes"] = "characters"

    def __post_init__(self) -> None:
        """Labels keep their numbers, or get new ones."""
        require(
            not (self.renumber_labels and self.num_classes),
            "num_classes",
            self.num_classes,
            "labels that are numbered anew are counted; leave it out, or renumber_labels",
        )


USUAL = Reading()
