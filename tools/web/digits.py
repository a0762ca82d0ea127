"""MNIST's test digits: /api/digits."""

from __future__ import annotations

import random
from typing import Annotated

from fastapi import APIRouter, HTTPException, Path
from pydantic import BaseModel, Field

from tools.compare.digits import mnist_test_digits
from tools.web.limits import problems
from tools.web.server import Server, TheServer

router = APIRouter(prefix="/api/digits", tags=["digits"])


class TestDigit(BaseModel):
    """A test image and its true label."""

    index: int
    label: int = Field(ge=0, le=9)
    pixels: list[int] = Field(description="28 x 28 grey levels, white on black", min_length=784, max_length=784)


async def test_digit(server: Server, index: int | None) -> TestDigit:
    """The test image ``index``; None: any of them.

    Raises:
        HTTPException: 404, there is none.
    """
    digits = await server.reading.run(mnist_test_digits, server.settings.data_dir)
    if digits is None:
        raise HTTPException(404, "MNIST is not on this machine; a training fetches it: python main.py --epochs 1")
    images, labels = digits
    if index is None:
        index = random.randrange(len(labels))
    if index >= len(labels):
        raise HTTPException(404, f"there is no test image {index}; there are {len(labels):,}")
    return TestDigit(index=index, label=int(labels[index]), pixels=images[index].reshape(-1).tolist())


@router.get("/random", response_model=TestDigit, responses=problems(403, 404, 503))
async def random_digit(server: TheServer) -> TestDigit:
    """A test image, drawn at random."""
    return await test_digit(server, None)


@router.get("/{index}", response_model=TestDigit, responses=problems(403, 404, 422, 503))
async def one_digit(server: TheServer, index: Annotated[int, Path(ge=0, le=1_000_000)]) -> TestDigit:
    """The test image of this number."""
    return await test_digit(server, index)
