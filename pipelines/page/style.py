"""How the page looks: by day, by night, on a phone and on paper."""

SERIES = 6  # colours for training stages

STYLE = """
:root {
  --paper: #faf9f6; --card: #ffffff; --line: #e5e2da; --text: #1d1e21; --muted: #6d6c68; --quiet: #a9a59b;
  --good: #1f8a5b; --bad: #c8452f; --wrong: #c8452f;
  --series-0: #3a6fd8; --series-1: #d9822b; --series-2: #0f9488; --series-3: #9a4fc4; --series-4: #c23b6e;
  --series-5: #7c8a12;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #121315; --card: #1a1c1f; --line: #2d3035; --text: #ececea; --muted: #9b9c9e; --quiet: #6f7277;
  --good: #4cc38a; --bad: #f0806a;
  --series-0: #7ba6ff; --series-1: #f3a95a; --series-2: #45cdbd; --series-3: #cb90f0; --series-4: #f283a9;
  --series-5: #c3d04c;
} }
* { box-sizing: border-box; }
html { background: var(--paper); color: var(--text); font: 15px/1.5 var(--sans); -webkit-text-size-adjust: 100%; }
body { margin: 0; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: clamp(28px, 4.4vw, 44px); line-height: 1.1; letter-spacing: -0.025em; margin: 0 0 14px;
  overflow-wrap: anywhere; }
h2 { font-size: 22px; letter-spacing: -0.015em; line-height: 1.2; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 0; }
b, strong { font-weight: 640; }
small { font-size: 12.5px; color: var(--muted); font-weight: 400; }
code { font: 12.5px/1.4 var(--mono); }
section { margin-top: 60px; }
.about { color: var(--muted); margin-bottom: 18px; max-width: 60em; text-wrap: pretty; }
.muted { color: var(--muted); }
.scroll { overflow-x: auto; }
.good { color: var(--good); } .bad { color: var(--bad); }
.check { font-size: 13.5px; margin-top: 6px; font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; white-space: nowrap; }
.swatch::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  background: var(--ink); margin-right: 7px; }

.top { display: flex; gap: 40px; justify-content: space-between; align-items: center; }
.lead { font-size: 18px; line-height: 1.45; max-width: 34em; text-wrap: balance; }
.verdict { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: center; margin-top: 18px; font-size: 14px;
  font-variant-numeric: tabular-nums; }
.chip { border: 1px solid currentColor; border-radius: 99px; padding: 1px 11px; font-size: 13px; }
.mosaic { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; width: 276px; flex: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 32px 0 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 18px 14px; }
.tiles dt { color: var(--muted); font-size: 13px; }
.tiles dd { margin: 0; } .tiles b { display: block; font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; }
.tiles .first { background: var(--text); border-color: var(--text); color: var(--paper); }
.tiles .first dt, .tiles .first small { color: inherit; opacity: 0.72; }
.tiles small { font-variant-numeric: tabular-nums; }

.graph { display: block; width: 100%; height: auto; margin: 0 auto; font-family: var(--sans); }
.graph .box { fill: var(--card); stroke: var(--line); } .graph a:hover .box { stroke: var(--ink); }
.graph .kind { fill: var(--ink); } .graph .name { font-size: 13.5px; font-weight: 640; fill: var(--text); }
.graph .edge { fill: none; stroke: var(--quiet); stroke-width: 1.3; } .graph marker path { fill: var(--quiet); }
.axis { font-size: 11px; fill: var(--muted); font-variant-numeric: tabular-nums; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.times { display: flex; gap: 2px; height: 26px; margin: 0 0 22px; border-radius: 7px; overflow: hidden; }
.times span { background: var(--ink); color: var(--card); font-size: 12px; line-height: 26px; padding: 0;
  text-align: center; min-width: 3px; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
.times .dim { opacity: 0.6; }

table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 16px 8px 0; border-bottom: 1px solid var(--line); vertical-align: middle;
  font-weight: 400; }
thead th { color: var(--muted); font-size: 13px; vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
.lineage small, .scores thead small, .samples strong small, .fates th small { display: block; }
.lineage td, .lineage th { vertical-align: top; }
.scores td, .compared td { white-space: nowrap; } .scores td b { display: inline-block; width: 3.2em; }
.compared td b { display: inline-block; width: 4.4em; }
.scores thead th, .compared thead th { color: var(--text); font-weight: 640; font-size: 15px; }
.scores thead small, .samples strong small { padding-left: 16px; }
.scores tbody tr:last-child > *, .compared tbody tr:last-child > * {
  border-top: 2px solid var(--text); font-weight: 640; }
.interval { width: 140px; height: 14px; vertical-align: -2px; margin: 0 8px 0 2px; }
.rule { stroke: var(--line); } .interval .rule { stroke: var(--quiet); opacity: 0.45; }
.range { stroke: var(--ink); stroke-width: 5; stroke-linecap: round; opacity: 0.38; }
.value { fill: var(--ink); }

.grid { margin-top: 8px; }
.samples { display: grid; grid-template-columns: minmax(120px, 0.6fr) repeat(var(--columns), minmax(0, 1fr));
  gap: 22px; padding: 14px 0; border-bottom: 1px solid var(--line); break-inside: avoid; }
.samples.head { padding: 4px 0 8px; position: sticky; top: 0; background: var(--paper); z-index: 1; }
.samples:last-child { border-bottom: 0; }
.samples > div > strong { display: none; }
.prompt small { display: block; } .prompt bdi { overflow-wrap: anywhere; line-height: 1.35; display: block; }
.four { display: grid; grid-template-columns: repeat(4, 1fr); gap: 5px; max-width: 460px; }
.samples p { font-size: 12.5px; color: var(--muted); margin-top: 5px; overflow: hidden; display: -webkit-box;
  -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow-wrap: anywhere; }
.reasons { margin: 6px 0 0; padding-left: 16px; font-size: 12.5px; } .reasons small { color: var(--muted); }
.samples p b { color: var(--text); }
.tile { display: block; position: relative; aspect-ratio: 1; border-radius: 6px; overflow: hidden;
  background: var(--line); box-shadow: 0 0 0 1px var(--line); }
.tile img { display: block; width: 100%; height: 100%; object-fit: cover; } .pixels { image-rendering: pixelated; }
.tile.wrong::after { content: ""; position: absolute; right: 0; bottom: 0; border: solid transparent;
  border-width: 7px; border-right-color: var(--wrong); border-bottom-color: var(--wrong); }
.cut { border-bottom: 2px solid var(--wrong); }
.none { display: grid; place-items: center; height: 100%; color: var(--muted); font-size: 11px; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 16px;
  margin-top: 14px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px 16px 10px; break-inside: avoid; }
figcaption > span { color: var(--muted); font-size: 13px; }
.chart { display: block; width: 100%; height: auto; margin-top: 4px; font-family: var(--sans); }
.chart .mark { stroke: var(--quiet); stroke-dasharray: 2 3; }
.line polyline { fill: none; stroke: var(--ink); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.line .dashed { stroke-dasharray: 4 4; opacity: 0.75; }
.dot { fill: transparent; } .dot:hover, .point { fill: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 10px; font-size: 12px; color: var(--muted); margin-top: 4px; }
.legend i { display: inline-block; width: 12px; border-top: 2.5px solid var(--ink); vertical-align: 3px;
  margin-right: 5px; }
.legend i.dashed { border-top-style: dashed; }

.counts th:first-child { width: 14em; } .counts .bar { margin-left: 8px; }
.number { display: inline-block; min-width: 4em; text-align: right; margin-right: 12px; }
.bar { display: inline-flex; width: min(220px, 60%); height: 9px; border-radius: 3px; background: var(--line);
  overflow: hidden; }
.bar i { height: 100%; background: var(--ink); min-width: 2px; }
.counts th, .counts td, .funnel th, .funnel td { padding-top: 5px; padding-bottom: 5px; }
.fates img { width: 40px; height: 40px; display: block; border-radius: 4px; box-shadow: 0 0 0 1px var(--line); }
.fates th, .fates td { padding-top: 6px; padding-bottom: 6px; }
.funnels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 0 32px;
  margin-top: 10px; }
.funnel th { width: 45%; overflow-wrap: anywhere; } .funnel td { white-space: nowrap; } .funnel .bar { width: 70px; }
.funnel td:last-child { color: var(--bad); text-align: right; padding-right: 0; }

details { border-bottom: 1px solid var(--line); padding: 9px 0; } details:target > summary { font-weight: 640; }
summary { cursor: pointer; display: flex; gap: 12px; align-items: baseline; } summary .swatch { min-width: 9em; }
summary code { margin-left: auto; color: var(--muted); }
.settings th { width: 1%; }
.settings { margin: 6px 0 10px; width: auto; max-width: 100%; }
.settings th { color: var(--muted); font-size: 13px; white-space: nowrap; }
.settings th, .settings td { padding: 3px 22px 3px 0; border: 0; vertical-align: top; }
.settings code { overflow-wrap: anywhere; }
footer { margin-top: 48px; color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }

@media screen and (max-width: 800px) {
  main { padding: 24px 16px 48px; }
  .top { flex-direction: column; align-items: flex-start; gap: 20px; }
  .samples { grid-template-columns: 1fr; gap: 10px; } .samples.head { display: none; }
  .samples > div > strong { display: block; }
  .samples strong small { display: inline; padding-left: 6px; }
  .tiles b { font-size: 24px; } .scores .interval { display: none; }
  .scores td small, .compared td small { display: block; font-size: 11px; }
  .scores th, .scores td, .lineage th, .lineage td { padding-right: 10px; }
}
@media print {
  :root { --paper: #fff; } main { max-width: none; padding: 0; zoom: 0.65; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section { margin-top: 32px; } h2, h3 { break-after: avoid; } tr, .scores, .funnel { break-inside: avoid; }
  .samples.head { position: static; }
}
"""
