"""What can be wrong with a picture of a digit."""

MIN_CONTRAST = 24  # grey levels between the paper and the darkest ink of a drawing; less is an empty sheet


class ImageError(ValueError):
    """What came is no image that can be read; one line says why."""


class TooLargeError(ImageError):
    """The image has more bytes or pixels than the limit allows."""


class EmptyImageError(ValueError):
    """Nothing is drawn on the image."""
