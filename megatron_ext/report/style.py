"""The look of a page: one palette for light and one for dark, safe for colour-blind readers."""

PAGE_CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --surface: #ffffff; --ink: #16191d; --muted: #626a73; --grid: #e4e7ea; --band: #f5f6f8;
  --series-0: #0067a5; --series-1: #c74a00; --series-2: #00805d; --series-3: #a8478a;
  --series-4: #8a6d00; --series-5: #3b8fc4; --series-6: #7a4fb5; --series-7: #5f6368;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --surface: #14171a; --ink: #e9ecef; --muted: #9aa3ac; --grid: #2b3036; --band: #1c2024;
    --series-0: #5bb4ec; --series-1: #ff8a4c; --series-2: #3fc79a; --series-3: #e594c8;
    --series-4: #dcb93f; --series-5: #9ad0f5; --series-6: #b99af0; --series-7: #b4b9bf;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 0.5rem; font-size: 1.125rem; }
p { margin: 0.25rem 0; }
.muted, figcaption { color: var(--muted); font-size: 0.875rem; }
.headline { margin: 1.25rem 0 1.5rem; padding-left: 1rem; border-left: 3px solid var(--series-0); font-size: 1.1875rem; max-width: 48rem;
  overflow-wrap: anywhere; }
.warning { margin: 0.5rem 0; padding-left: 1rem; border-left: 3px solid var(--series-1); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 0.75rem; margin: 0; }
.tiles div { padding: 0.75rem 1rem; border-radius: 0.5rem; background: var(--band); }
.tiles dt { color: var(--muted); font-size: 0.8125rem; }
.tiles dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 0.9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.75rem; border-bottom: 1px solid var(--grid); text-align: left; white-space: nowrap; }
th { color: var(--muted); font-size: 0.8125rem; font-weight: 500; }
td.number, th.number { text-align: right; }
th:first-child, td:first-child { padding-left: 0; }
tr.new-phase td { border-top: 2px solid var(--grid); }
tr.control td { color: var(--muted); }
.swatch { display: inline-block; width: 0.625rem; height: 0.625rem; margin-right: 0.5rem; border-radius: 50%; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.25rem; font-size: 0.875rem; }
.legend .swatch { border-radius: 0.125rem; margin-right: 0.375rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.75rem 2rem; }
figure { margin: 0; min-width: 0; }
figure + figure, figure + .grid { margin-top: 1.75rem; }
figure h3 { margin: 0; font-size: 1rem; font-weight: 600; }
.grid figure { margin-top: 0; }
figure svg { display: block; width: 100%; height: auto; margin-top: 0.25rem; overflow: visible; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-variant-numeric: tabular-nums; }
.narrow { display: none; }
@media (max-width: 44rem) {
  body { padding-top: 1.5rem; }
  .wide { display: none; }
  .narrow { display: block; }
}
details { margin: 0.5rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; padding: 1rem; border-radius: 0.5rem; background: var(--band); font-size: 0.8125rem; line-height: 1.45; }
@media print { body { max-width: none; } .legend { display: flex; flex-wrap: wrap; gap: 0 1.25rem; font-size: 0.875rem; }
.legend .swatch { border-radius: 0.125rem; margin-right: 0.375rem; }
.grid { display: block; } figure { break-inside: avoid; margin-bottom: 1.5rem; } }
"""
