"""HTML pages of reports."""

import re


def without_images(page: str) -> str:
    """Returns a page without the content of its images, in which any letters may occur."""
    return re.sub(r"(data:image/png;base64,)[A-Za-z0-9+/=]*", r"\1", page)
