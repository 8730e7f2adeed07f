"""Colours of a network's training images, by which tiles are normalised: what they are, and which values cannot be right."""

Colour = tuple[float, float, float]  # red, green, blue; 1 is full intensity


def checked_mean(mean: Colour) -> Colour:
    """Return the mean of training images; raises ValueError if it is of another range than 0 to 1."""
    return _checked(mean, "must be 0 to 1", at_least_0=True)


def checked_std(std: Colour) -> Colour:
    """Return the standard deviation of training images; raises ValueError if it is not above 0 and at most 1."""
    return _checked(std, "must be above 0 and at most 1", at_least_0=False)


def _checked(colour: Colour, expected: str, *, at_least_0: bool) -> Colour:
    for value in colour:
        if not (0 < value <= 1 or (at_least_0 and value == 0)):
            remedy = ": divide by 255" if value > 1 else ""
            raise ValueError(f"{expected}, and {value:g} is not{remedy}")
    return colour
