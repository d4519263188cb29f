"""Draws `docs/architecture.svg`: one step, and how often each part of it happens. `python docs/tools/architecture.py`."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 980, 600
EVERY, FACTORS, REFRESH, ONCE = "#3f6fb5", "#3a8a4d", "#c87a1e", "#777777"

# left, top, width, height, color, title, lines
BOXES = [
    (20, 20, 235, 92, ONCE, "loss_fn(params, batch)", ["yours, unchanged, with a", "loss of kfe.losses"]),
    (
        285,
        20,
        235,
        92,
        ONCE,
        "find_layers",
        ["the jaxpr; parameters followed", "to their uses by rules, once"],
    ),
    (
        560,
        20,
        400,
        92,
        ONCE,
        "Layers",
        ["static: names, matrices, kinds, uses;", "a table, with reasons for the rest"],
    ),
    (
        20,
        160,
        500,
        92,
        EVERY,
        "value_grad_and_taps",
        [
            "the loss rebuilt with a tag behind each use and at each",
            "registered loss; one forward and one backward pass",
        ],
    ),
    (560, 160, 185, 92, EVERY, "loss, gradients", ["those of", "jax.value_and_grad"]),
    (775, 160, 185, 92, EVERY, "taps", ["what the step was", "given; read lazily"]),
    (40, 330, 200, 92, FACTORS, "statistics", ["a second backward pass:", "rows, sums, tokens"]),
    (275, 330, 200, 92, FACTORS, "factors", ["running averages:", "A⊗G, R⊗S + P⊗Q, …"]),
    (510, 330, 200, 92, REFRESH, "refresh", ["inverses, roots, bases;", "the last good ones kept"]),
    (745, 330, 200, 92, EVERY, "precondition", ["each layer's gradient", "as a matrix V → Δ"]),
    (40, 470, 320, 92, EVERY, "rest", ["Adam, or what you name, for the", "parameters outside the layers"]),
    (
        395,
        470,
        550,
        92,
        EVERY,
        "the chain around it",
        ["momentum, length or bounds of a step, weight decay,", "learning rate: links of optax.chain"],
    ),
]

# points of each arrow
ARROWS = [
    [(255, 66), (283, 66)],
    [(520, 66), (558, 66)],
    [(125, 112), (125, 158)],
    [(760, 112), (760, 127), (400, 127), (400, 158)],
    [(520, 206), (558, 206)],
    [(490, 160), (490, 144), (868, 144), (868, 158)],
    [(868, 252), (868, 276), (140, 276), (140, 328)],
    [(652, 252), (652, 292), (845, 292), (845, 328)],
    [(240, 376), (273, 376)],
    [(475, 376), (508, 376)],
    [(710, 376), (743, 376)],
    [(845, 422), (845, 468)],
    [(360, 516), (393, 516)],
]

LEGEND = [
    (ONCE, "once"),
    (EVERY, "every step"),
    (FACTORS, "every factor_update_period steps"),
    (REFRESH, "every inverse_ or basis_update_period steps"),
]


def box(x: int, y: int, width: int, height: int, color: str, title: str, lines: list[str]) -> str:
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{color}" fill-opacity="0.1" stroke="{color}" '
        'stroke-width="1.6"/>',
        f'<text x="{x + 14}" y="{y + 29}" class="title" fill="{color}">{escape(title)}</text>',
    ]
    parts += [
        f'<text x="{x + 14}" y="{y + 53 + 21 * i}" class="line">{escape(line)}</text>'
        for i, line in enumerate(lines)
    ]
    return "\n".join(parts)


def arrow(points: list[tuple[int, int]]) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" class="arrow" marker-end="url(#head)"/>'


def legend() -> str:
    parts, x = [], 40
    for color, words in LEGEND:
        parts.append(f'<rect x="{x}" y="578" width="13" height="13" rx="2" fill="{color}"/>')
        parts.append(f'<text x="{x + 20}" y="590" class="legend">{words}</text>')
        x += 46 + 7 * len(words)
    return "\n".join(parts)


def drawing() -> str:
    frame = (
        '<rect x="20" y="304" width="940" height="268" rx="9" fill="none" stroke="#999" stroke-dasharray="5 4"/>\n'
        '<text x="290" y="322" class="legend">tx.update(gradients, opt_state, params, taps=taps)</text>'
    )
    style = (
        "text { font-family: Helvetica, Arial, 'DejaVu Sans', sans-serif; } .title { font-size: 16px; font-weight: 600; } "
        ".line { font-size: 13.5px; fill: #333; } .legend { font-size: 12.5px; fill: #555; } "
        ".arrow { fill: none; stroke: #666; stroke-width: 1.5; }"
    )
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#666"/></marker></defs>'
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>One step of an optimizer of kfe_optax</title>",
        f"<style>{style}</style>",
        head,
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="9" fill="#ffffff"/>',
        frame,
        *(box(*given) for given in BOXES),
        *(arrow(points) for points in ARROWS),
        legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (Path(__file__).parents[1] / "architecture.svg").write_text(drawing(), encoding="utf-8")
