"""The page's colours and style sheet. Contrast of every pair below is held by a test."""

from __future__ import annotations

LIGHT = {
    "page": "#f7f8f6",
    "card": "#ffffff",
    "soft": "#f1f3f0",
    "ink": "#1b2420",
    "muted": "#56635c",
    "rule": "#e1e5e1",
    "accent": "#17714b",
    "accent-soft": "#e5f3eb",
    "before": "#7d8a83",
    "bad": "#ab2f28",
    "bad-soft": "#fbebe9",
    "warn": "#7d5200",
    "warn-soft": "#fbf2de",
}
DARK = {
    "page": "#101412",
    "card": "#181d1a",
    "soft": "#202723",
    "ink": "#e7ece9",
    "muted": "#a1aea7",
    "rule": "#2d3631",
    "accent": "#62cb9b",
    "accent-soft": "#173125",
    "before": "#85928b",
    "bad": "#f28d84",
    "bad-soft": "#3a1f1c",
    "warn": "#e5b95f",
    "warn-soft": "#332a15",
}
TEXT_PAIRS = (
    *((ink, ground) for ink in ("ink", "muted") for ground in ("page", "card", "soft")),
    *((tone, ground) for tone in ("accent", "bad", "warn") for ground in ("card", f"{tone}-soft")),
    ("accent", "page"),
    *(("ink", f"{tone}-soft") for tone in ("accent", "bad", "warn")),
)
"""(text, ground) colours that meet on the page: at least 4.5 to 1 (WCAG AA)."""
GRAPHIC_PAIRS = (("before", "card"), ("accent", "card"), ("bad", "card"))
"""(mark, ground) of charts: at least 3 to 1."""


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two `#rrggbb` colours.

    >>> round(contrast("#000000", "#ffffff"))
    21
    """
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def style_sheet() -> str:
    """The whole style sheet, both colour schemes, small screens and print."""
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
        f"@media print{{:root{{color-scheme:light;{_variables(LIGHT)}}}}}" + _RULES
    )


def _variables(palette: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in palette.items())


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
 font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif;
 font-variant-numeric:tabular-nums}
main,header,footer{max-width:1000px;margin:0 auto;padding:0 32px}
header{padding-top:56px}
h1{font-size:32px;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 8px}
h2{font-size:20px;line-height:1.3;font-weight:650;letter-spacing:-.01em;margin:56px 0 16px}
h3{font-size:15px;line-height:1.4;font-weight:600;margin:32px 0 12px}
p{margin:0 0 12px}
.eyebrow{font-size:13px;font-weight:600;letter-spacing:.04em;color:var(--accent);margin:0 0 8px}
.meta,.note{color:var(--muted);font-size:14px}
.note{max-width:70ch}.note.after{margin-top:12px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:24px}
.verdict{margin-top:32px;border-radius:12px;padding:24px 28px;display:flex;gap:20px;align-items:flex-start;
 background:var(--tone-soft);--tone:var(--accent);--tone-soft:var(--accent-soft)}
.verdict.fail{--tone:var(--bad);--tone-soft:var(--bad-soft)}
.verdict.insufficient{--tone:var(--warn);--tone-soft:var(--warn-soft)}
.verdict p{margin:0;font-size:18px;line-height:1.5;max-width:66ch}
.pill{flex:none;font-size:13px;line-height:27px;font-weight:700;letter-spacing:.06em;color:var(--tone)}
.pill::before{content:"";display:inline-block;width:10px;height:10px;border-radius:50%;background:var(--tone);
 margin-right:8px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:16px;margin-top:16px}
.tile{padding:20px 24px}
.tile .label{font-size:14px;color:var(--muted);margin:0}
.tile .figure{font-size:28px;line-height:1.3;font-weight:600;letter-spacing:-.02em;margin:4px 0 0;
 white-space:nowrap}
.tile .sub{font-size:13px;color:var(--muted);margin:2px 0 0}
.tile .from{color:var(--muted);font-weight:450}
.measure{display:grid;grid-template-columns:minmax(0,2fr) minmax(0,3fr);gap:8px 40px;padding:24px 0;
 border-top:1px solid var(--rule);align-items:center}
.measure:first-child{border-top:0;padding-top:0}.measure:last-child{padding-bottom:0}
.measure h3{margin:0 0 4px}
.measure .change{font-size:20px;font-weight:600;letter-spacing:-.01em;margin:0}
.measure .note{margin:4px 0 0}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
figure{margin:0}
.chart{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:20px 24px 16px}
.chart:first-child:nth-last-child(odd){grid-column:1/-1}
figcaption{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:14px;margin-bottom:16px}
figcaption .name{font-weight:600;margin-right:auto}
.key{color:var(--muted)}
.key::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;background:var(--mark);
 margin-right:6px;vertical-align:middle}
.accent{--mark:var(--accent)}.before{--mark:var(--before)}.key.ink,g.ink{--mark:var(--ink)}
.limit{--mark:var(--bad)}g.limit .line{stroke-dasharray:6 5;stroke-width:1.5}
.plot{padding:4px 4px 28px 44px}
.plot svg{display:block;overflow:visible}
.intervals{padding-left:56px;padding-bottom:30px}
.tick{font-size:12px;fill:var(--muted)}
.grid{stroke:var(--rule)}.axis{stroke:var(--before)}
.line{fill:none;stroke:var(--mark);stroke-width:2;stroke-linejoin:round;vector-effect:non-scaling-stroke}
.faint{stroke-width:1;opacity:.35}
.whisker{stroke:var(--mark);stroke-width:4;stroke-linecap:round;opacity:.45}
.dot{fill:var(--mark);stroke:var(--card);stroke-width:1.5}
.bars{margin:0 0 24px}.bars .plot{padding-left:132px}.bar{fill:var(--mark);opacity:.85}
.band{fill:transparent}.band:hover{fill:var(--ink);fill-opacity:.07}
table{border-collapse:collapse;width:100%;font-size:15px}
th{text-align:left;font-size:13px;font-weight:500;color:var(--muted)}
th,td{padding:8px 16px 8px 0;border-top:1px solid var(--rule);vertical-align:top}
tr:first-child>th{border-top:0}
th,.n{white-space:nowrap;overflow-wrap:normal}.n{text-align:right}.n+td,.n+th{padding-left:24px}td:last-child,th:last-child{padding-right:0}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:20px 32px;margin:0}
dt{font-size:13px;color:var(--muted)}dd{margin:0}
dl+table,dl+.note,table+.note,table+table,.note+table{margin-top:24px}
.paths dl{display:block;margin-top:20px}.card>:last-child{margin-bottom:0}
.sample{margin-bottom:16px}
.sample .head{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:14px;color:var(--muted);
 margin-bottom:12px}
.sample .head b{color:var(--ink);font-weight:600;margin-right:auto}
.said{white-space:pre-wrap;unicode-bidi:isolate;font-size:15px;line-height:1.55;margin:4px 0 0;
 max-height:320px;overflow:auto}
.prompt{background:var(--soft);border-radius:8px;padding:12px 16px;margin-bottom:16px}
.voices{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:24px}
.who{font-size:13px;color:var(--muted)}
.who .ok{color:var(--accent);font-weight:600}
.voice.adapter .said{border-inline-start:3px solid var(--accent);padding-inline-start:12px}
.more{color:var(--muted);font-size:13px}
.notices{list-style:none;margin:16px 0 0;padding:0}
.notices li{padding:14px 20px;border-radius:8px;background:var(--soft);margin-bottom:8px;font-size:15px}
.notices .is-warning{background:var(--warn-soft)}
.finding{margin-bottom:16px;border-inline-start:4px solid var(--tone);--tone:var(--accent)}
.finding.error{--tone:var(--bad)}.finding.warning{--tone:var(--warn)}
.finding h3{margin:0 0 4px}.finding .who b{color:var(--tone)}
.finding dl{display:block}.finding dl>div{margin-top:12px}
.finding .plots{margin-top:20px}.finding .chart{border:0;padding:0}
.notices b{font-weight:600;margin-right:8px}.notices .is-warning b{color:var(--warn)}
code,pre{font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
pre{margin:0;white-space:pre-wrap}
.command{display:block;background:var(--soft);border-radius:6px;padding:6px 12px;margin-top:4px}
.steps p{margin:0 0 16px}.steps p:last-child{margin:0}
footer{padding-top:56px;padding-bottom:56px;color:var(--muted);font-size:13px}
@media (max-width:720px){
 main,header,footer{padding-left:16px;padding-right:16px}
 header{padding-top:32px}h1{font-size:26px}h2{margin-top:40px}
 .card,.chart{padding:18px 16px}.verdict{display:block;padding:18px 16px}.verdict p{font-size:17px}
 .tiles{grid-template-columns:repeat(2,minmax(0,1fr));gap:12px}
 .tile{padding:16px}.tile .figure{font-size:21px}
 .measure,.charts,.voices{grid-template-columns:minmax(0,1fr)}.voices{gap:16px}
 dl{grid-template-columns:repeat(2,minmax(0,1fr));gap:16px 20px}
 th,td{padding-right:10px;font-size:14px}
}
@media print{
 body{background:#fff;font-size:10pt}main,header,footer{max-width:none;padding-left:0;padding-right:0}
 header{padding-top:0}.said{max-height:none}
 .tiles{grid-template-columns:repeat(4,minmax(0,1fr))}.tile,.card{padding:14px 16px}
 .tile .figure{font-size:18px}
 h2{margin-top:28px}footer{padding-top:20px;padding-bottom:0}.said,.verdict p{font-size:10.5pt}
 .tile,.chart,.verdict,.sample,.measure,dl>div,tr{break-inside:avoid}h2,h3{break-after:avoid}
 .verdict,.prompt,.notices li,.dot,.key::before,.pill::before{
  print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""
