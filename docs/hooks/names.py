"""Mark inline code without spaces, so that the style sheet keeps options and names in tables on one line."""

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Give inline code without spaces the class `name`."""
    return re.sub(r"<code>([^<\s]+)</code>", r'<code class="name">\1</code>', html)
