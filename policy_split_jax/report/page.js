"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const coarse = matchMedia("(pointer: coarse)");
  const dark = matchMedia("(prefers-color-scheme: dark)");

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const themed = (layout) => {
    const axis = { gridcolor: colour("--grid"), linecolor: colour("--grid"), tickcolor: colour("--grid") };
    return {
      ...layout,
      autosize: true,
      // A finger that starts on a chart must still scroll the page.
      dragmode: coarse.matches ? false : "zoom",
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: colour("--muted") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--grid"), font: { color: colour("--text") } },
      xaxis: { ...layout.xaxis, ...axis },
      yaxis: { ...layout.yaxis, ...axis },
    };
  };

  const plot = (chart) =>
    Plotly.react(document.getElementById("chart-" + chart.slug), chart.data, themed(chart.layout), {
      displayModeBar: false,
      responsive: true,
    });

  charts.forEach(plot);
  dark.addEventListener("change", () => charts.forEach(plot));

  for (const button of document.querySelectorAll("button[data-chart]")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      const chart = charts.find((candidate) => candidate.slug === button.dataset.chart);
      chart.layout.yaxis.type = on ? "log" : "linear";
      plot(chart);
    });
  }

  const choice = document.getElementById("sample-choice");
  if (choice) {
    const sets = document.querySelectorAll("[data-samples]");
    const show = () => sets.forEach((set) => { set.hidden = set.dataset.samples !== choice.value; });
    choice.addEventListener("change", show);
    show();
  }
})();
