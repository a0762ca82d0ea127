import math

import pytest
from PIL import Image
from scipy import ndimage

from data_utils import TensorBatches, load_images
from image_data import augmentation
from image_data.augmentation import augment, erase, inverse_affine, rotate, smooth_displacement, thicken, warp
from image_data.policies import POLICIES, Policy, get_policy
from imports import torch, transforms

SIZE = torch.Size([28, 28])
BILINEAR = transforms.InterpolationMode.BILINEAR


@pytest.fixture(scope="module")
def digits(mnist):
    """100 real digits, float grey levels [100, 1, 28, 28]."""
    return load_images(mnist, train=True)[0][:100].unsqueeze(1).float()


# The specification's rotation


def source_coordinates(degrees: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in the original (x, y, in pixels, cell i is [i, i + 1)) each output pixel's centre comes from."""
    angle = math.radians(degrees)
    y, x = torch.meshgrid(torch.arange(28.0).double() - 13.5, torch.arange(28.0).double() - 13.5, indexing="ij")
    return x * math.cos(angle) - y * math.sin(angle) + 14, x * math.sin(angle) + y * math.cos(angle) + 14


@pytest.mark.parametrize("degrees", [-7.0, -5.21, -1.0, 0.0, 0.3, 3.0, 6.66, 7.0, 30.0])
def test_rotation_is_pils_pixel_for_pixel(digits, degrees):
    ours = rotate(digits, torch.full((100,), degrees)).squeeze(1)
    # what transforms.RandomRotation((-7, 7), fill=(1,)) calls with the angle that it drew
    pil = [
        transforms.functional.rotate(Image.fromarray(image.numpy()), degrees, fill=(1,))
        for image in digits.squeeze(1).byte()
    ]
    theirs = torch.stack([transforms.functional.pil_to_tensor(image).squeeze(0) for image in pil]).float()
    different = (ours != theirs).any(0)
    # PIL counts in 1/65536 of a pixel and we in float32, so they may part where a source lies on a cell's edge
    x, y = source_coordinates(degrees)
    on_an_edge = ((x - x.round()).abs() < 1e-3) | ((y - y.round()).abs() < 1e-3)
    assert not (different & ~on_an_edge).any()
    assert (ours != theirs).float().mean() < 0.005


def test_rotation_turns_counter_clockwise_and_fills_with_one():
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 13:15, 22:26] = 200.0  # to the right of the centre
    turned = rotate(image, torch.tensor([90.0]))
    assert turned[0, 0, 2:6, 13:15].eq(200).all()  # now above it
    assert rotate(image, torch.tensor([45.0]))[0, 0, 0, 0] == 1


# The other policies, each against torchvision's or SciPy's own for the same parameters


@pytest.mark.parametrize(
    ("angle", "shift", "scale", "shear"),
    [
        (0.0, (0.0, 0.0), 1.0, 0.0),
        (10.0, (0.0, 0.0), 1.0, 0.0),
        (0.0, (2.0, -3.0), 1.0, 0.0),
        (0.0, (0.0, 0.0), 0.85, 0.0),
        (0.0, (0.0, 0.0), 1.0, 12.0),
        (-9.0, (1.0, 2.0), 1.15, -7.0),
    ],
)
def test_affine_is_torchvisions(digits, angle, shift, scale, shear):
    n = len(digits)
    matrix = inverse_affine(
        torch.full((n,), angle), torch.tensor([shift] * n), torch.full((n,), scale), torch.full((n,), shear), SIZE
    )
    theirs = transforms.functional.affine(digits, angle, list(shift), scale, [shear, 0.0], BILINEAR)
    torch.testing.assert_close(warp(digits, matrix, None), theirs, rtol=1e-4, atol=0.02)


def test_affine_of_images_that_are_not_square_is_torchvisions():
    image = torch.rand(1, 1, 20, 32) * 255
    matrix = inverse_affine(
        torch.tensor([20.0]), torch.tensor([[3.0, -2.0]]), torch.tensor([0.9]), torch.tensor([5.0]), image.shape[-2:]
    )
    theirs = transforms.functional.affine(image, 20.0, [3.0, -2.0], 0.9, [5.0, 0.0], BILINEAR)
    torch.testing.assert_close(warp(image, matrix, None), theirs, rtol=1e-4, atol=0.02)


def test_elastic_is_torchvisions(digits):
    points = torch.rand(len(digits), 2, 5, 5, generator=torch.Generator().manual_seed(0)) * 4 - 2
    displacement = smooth_displacement(points, SIZE)
    ours = warp(digits, None, displacement)
    for image, field, mine in zip(digits, displacement, ours, strict=True):
        theirs = transforms.functional.elastic_transform(image, field.view(1, 2, 28, 28).permute(0, 2, 3, 1), BILINEAR)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0.02)


def test_a_displacement_passes_through_its_control_points():
    points = torch.randn(3, 2, 5, 5)
    field = smooth_displacement(points, torch.Size([29, 29])).view(3, 2, 29, 29)  # every seventh pixel is one
    torch.testing.assert_close(field[:, :, ::7, ::7], points * 2 / 29)


def test_thickness_is_scipys_dilation_and_erosion(digits):
    wide, thin = (thicken(digits, torch.full((100,), amount)) for amount in (1.0, -1.0))
    for image, wider, thinner in zip(digits, wide, thin, strict=True):
        grey = image[0].numpy()
        assert torch.equal(wider[0], torch.from_numpy(ndimage.grey_dilation(grey, (3, 3))))
        assert torch.equal(thinner[0], torch.from_numpy(ndimage.grey_erosion(grey, (3, 3))))
    assert torch.equal(thicken(digits, torch.zeros(100)), digits)
    torch.testing.assert_close(thicken(digits, torch.full((100,), 0.25)), 0.75 * digits + 0.25 * wide)


def test_erased_is_the_square_that_was_drawn():
    images = torch.full((2, 1, 28, 28), 9.0)
    erased = erase(images, torch.tensor([[0.25, 0.5, 0.5], [0.0, 1.0, 0.0]]), 8.0)  # centre at (7, 14), side 4; none
    expected = images.clone()
    expected[0, 0, 12:16, 5:9] = 0.0
    assert torch.equal(erased, expected)


# What a policy is


@pytest.mark.parametrize("name", POLICIES)
def test_each_image_has_its_own_draws(name):
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[4:24, 12:16] = 200
    batches = TensorBatches(
        image.repeat(64, 1, 1), torch.zeros(64, dtype=torch.long), 64, POLICIES[name], torch.Generator().manual_seed(0)
    )
    batch, _ = next(iter(batches))
    different = len(batch.flatten(1).unique(dim=0))
    assert different == 1 if name == "none" else different > 20


@pytest.mark.parametrize("name", POLICIES)
def test_without_strength_nothing_changes(digits, name):
    policy = get_policy(name, strength=0.0)
    out = augment(digits, policy, torch.rand(len(digits), policy.draws))
    torch.testing.assert_close(out, digits, rtol=1e-4, atol=0.02)


def test_draws_reach_the_ends_of_their_ranges_and_no_further(digits, monkeypatch):
    asked = []
    monkeypatch.setattr(augmentation, "inverse_affine", lambda *args: asked.append(args) or inverse_affine(*args))
    policy = Policy(rotation=10.0, shift=1.5, scale=0.1, shear=8.0)
    augment(digits[:2], policy, torch.tensor([[0.0] * 5, [1.0] * 5]))
    ((degrees, shift, scale, shear, _),) = asked
    assert (degrees.tolist(), shear.tolist()) == ([-10.0, 10.0], [-8.0, 8.0])
    assert shift.tolist() == [[-1.5, -1.5], [1.5, 1.5]]
    torch.testing.assert_close(scale, torch.tensor([0.9, 1.1]))


def test_strength_is_a_factor_of_every_range():
    twice = get_policy("elastic", strength=2.0)
    once = POLICIES["elastic"]
    for key in ("rotation", "shift", "scale", "shear", "elastic"):
        assert getattr(twice, key) == 2 * getattr(once, key)


@pytest.mark.parametrize("name", POLICIES)
def test_no_strength_makes_what_is_no_image(digits, name):
    policy = get_policy(name, strength=10.0)
    for draws in (torch.zeros, torch.ones, torch.rand):
        out = augment(digits.clone(), policy, draws(len(digits), policy.draws))
        assert 0 <= out.min() <= out.max() <= 255.01


def test_a_policy_is_its_parts_one_after_the_other(digits):
    policy = Policy(rotation=10.0, elastic=1.5, thickness=0.5, erase=8.0)
    draws = torch.rand(len(digits), policy.draws)
    affine, elastic, thickness, hole = draws.split([5, 50, 1, 3], dim=1)
    angle = 20 * affine[:, 0] - 10
    none, one = torch.zeros(len(digits)), torch.ones(len(digits))
    matrix = inverse_affine(angle, torch.zeros(len(digits), 2), one, none, digits.shape[-2:])
    field = smooth_displacement(3 * elastic.view(-1, 2, 5, 5) - 1.5, digits.shape[-2:])
    expected = erase(thicken(warp(digits, matrix, field), thickness[:, 0] - 0.5), hole, 8.0)
    torch.testing.assert_close(augment(digits, policy, draws), expected, rtol=1e-4, atol=0.02)


def test_unknown_policy_is_told_the_known_ones():
    with pytest.raises(ValueError, match="'mixup' is not known; choose from none, rotate, affine, elastic"):
        get_policy("mixup")
