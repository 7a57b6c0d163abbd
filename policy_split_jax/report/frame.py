"""What every page of ours is: one HTML file that loads nothing and so can be mailed, archived and opened anywhere.

Everything that comes from a run (texts of the model, names, configuration) is escaped. As a second barrier
the page carries a content security policy that allows its own scripts by their hash, and no other script,
image or request.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from types import MappingProxyType
from typing import Any

from policy_split_jax.files import whole_file
from policy_split_jax.report.charts import Chart


def frame(
    title: str,
    header: str,
    main: str,
    *,
    charts: Sequence[Chart],
    scripts: Sequence[str],
    data: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The whole page.

    `header` and `main` are markup. `scripts` are files beside this module; they read the charts from the element
    `chart-data` and the values of `data` from elements of their names. Only a page with the script watch.js may ask its
    own server, and nobody else, for anything.
    """
    from plotly.offline import get_plotlyjs

    texts = [*([get_plotlyjs()] if charts else []), *map(resource, scripts)]
    drawn = [{"slug": chart.slug, "data": chart.data, "layout": chart.layout} for chart in charts]
    values = {"chart-data": drawn, **data}
    return Template(resource("template.html")).substitute(
        policy=content_policy(*texts, connect="watch.js" in scripts),
        title=html.escape(f"Policy Split · {title}"),
        header=header,
        main=main,
        data="\n".join(
            f'<script type="application/json" id="{name}">{embedded_json(value)}</script>'
            for name, value in values.items()
        ),
        scripts="\n".join(f"<script>{text}</script>" for text in texts),
    )


def write_page(page: str, output: Path) -> Path:
    """Writes a page to `output`, whose folder is made, and returns its path."""
    output.parent.mkdir(parents=True, exist_ok=True)
    # Lone surrogates can come out of a tokenizer, and have no UTF-8.
    with whole_file(output, errors="replace") as file:
        file.write(page)
    return output


def resource(name: str) -> str:
    """A text file beside this module."""
    return resources.files("policy_split_jax.report").joinpath(name).read_text(encoding="utf-8")


def content_policy(*scripts: str, connect: bool = False) -> str:
    """The Content-Security-Policy of a page that runs these scripts and loads nothing; `connect` to its own server."""
    digests = (hashlib.sha256(script.encode("utf-8")).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in digests)
    # plotly.js sets the styles of its elements itself, and tries out an image that it holds as data.
    rest = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}" + ("; connect-src 'self'" if connect else "")


def embedded_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    # `</script>` or `<!--` in a name would otherwise end the element that holds the data.
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def charts_section(heading: str, charts: Sequence[Chart]) -> str:
    """Cards of charts under a heading."""
    cards = "\n".join(chart_card(chart) for chart in charts)
    return f'<h2>{html.escape(heading)}</h2>\n<div class="grid">\n{cards}\n</div>'


def chart_card(chart: Chart) -> str:
    """The place of a chart, with its words."""
    title, summary = html.escape(chart.title), html.escape(f"{chart.title}. {chart.summary}")
    button = (
        f'<button type="button" data-chart="{chart.slug}" aria-pressed="false">log axis</button>' if chart.log else ""
    )
    # The legend stands above the lines, and takes a row for every entry or two.
    height = 300 + 18 * max(0, sum(trace["showlegend"] for trace in chart.data) - 3)
    return (
        f'<section class="card chart" aria-labelledby="title-{chart.slug}">'
        f'<header><h3 id="title-{chart.slug}">{title}</h3>{button}</header>'
        f"<p>{html.escape(chart.look_for)}</p>"
        f'<div class="plot" id="chart-{chart.slug}" role="img" style="min-height: {height}px"'
        f' aria-label="{summary}"></div></section>'
    )
