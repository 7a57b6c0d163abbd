"use strict";
// Draws the charts of a page, and shows or hides runs in them.
(() => {
  const coarse = matchMedia("(pointer: coarse)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hiddenRuns = new Set();
  const logarithmic = new Set();
  let charts = [];

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const read = (page) => JSON.parse(page.getElementById("chart-data").textContent);

  const readable = (note) =>
    note.name ? { ...note, font: { ...note.font, color: colour(`--${note.name.replace("_", "-")}-text`) } } : note;

  const themed = (layout, slug) => {
    const axis = { gridcolor: colour("--grid"), linecolor: colour("--grid"), tickcolor: colour("--grid") };
    return {
      ...layout,
      autosize: true,
      // A finger that starts on a chart must still scroll the page.
      dragmode: coarse.matches ? false : "zoom",
      // A chart that is drawn anew keeps what was zoomed into.
      uirevision: slug,
      annotations: (layout.annotations || []).map(readable),
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: colour("--muted") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--grid"), font: { color: colour("--text") } },
      xaxis: { ...layout.xaxis, ...axis },
      yaxis: { ...layout.yaxis, ...axis, ...(logarithmic.has(slug) ? { type: "log" } : {}) },
    };
  };

  const plot = ({ slug, data, layout }) => {
    const seen = data.map((trace) => (hiddenRuns.has(trace.meta) ? { ...trace, visible: false } : trace));
    Plotly.react(document.getElementById("chart-" + slug), seen, themed(layout, slug), {
      displayModeBar: false,
      responsive: true,
    });
  };

  const press = (button, on) => button.setAttribute("aria-pressed", String(on));

  document.addEventListener("click", ({ target }) => {
    const button = target.closest("button[data-chart], button[data-run]");
    if (!button) return;
    const { chart, run } = button.dataset;
    const [set, member] = chart === undefined ? [hiddenRuns, Number(run)] : [logarithmic, chart];
    if (!set.delete(member)) set.add(member);
    press(button, chart === undefined ? !set.has(member) : set.has(member));
    (chart === undefined ? charts : charts.filter(({ slug }) => slug === chart)).forEach(plot);
  });
  dark.addEventListener("change", () => charts.forEach(plot));

  document.addEventListener("renewed", ({ detail }) => {
    const before = new Map(charts.map((chart) => [chart.slug, JSON.stringify(chart)]));
    charts = read(detail);
    for (const chart of charts) {
      const place = document.getElementById("chart-" + chart.slug);
      place.setAttribute("aria-label", detail.getElementById(place.id).getAttribute("aria-label"));
      const drawn = place.classList.contains("js-plotly-plot");
      if (!drawn || before.get(chart.slug) !== JSON.stringify(chart)) plot(chart);
    }
    for (const button of document.querySelectorAll("button[data-chart]")) {
      press(button, logarithmic.has(button.dataset.chart));
    }
    for (const button of document.querySelectorAll("button[data-run]")) {
      press(button, !hiddenRuns.has(Number(button.dataset.run)));
    }
  });

  charts = read(document);
  charts.forEach(plot);
})();
