"""The README as a package index shows it, where links into the repository lead nowhere.

With a `Source` among the project's URLs they become absolute; without one, links become their text
and images are left out.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# [text](target) or ![text](target), unless the target has a scheme or lies on the same page.
RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def description(text: str, source: str | None) -> str:
    """Markdown with relative links replaced; source is the repository's address."""

    def replaced(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        if source is None:
            return "" if image else words
        kind = "raw" if image else "blob"
        return f"{image}[{words}]({source.rstrip('/')}/{kind}/main/{target})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(x if x.startswith("```") else RELATIVE.sub(replaced, x) for x in parts)


class Readme(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": description(text, source),
        }
