"""Bytes, seconds and counts as a reader wants them."""


def size(nbytes: int) -> str:
    """Bytes as MB or GB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """3d 04:05:06, without the days where there are none."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{rest:02}"
    return f"{days}d {hours:02}:{minutes:02}:{rest:02}" if days else clock


def span(seconds: float) -> str:
    """3.14 s, and as of `duration` from a minute on."""
    return f"{seconds:.3g} s" if seconds < 60 else duration(seconds)


def count(value: int | float) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,}"
