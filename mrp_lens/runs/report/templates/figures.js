// Draws each figure when it comes into view, and all of them before the page is printed. Plotly lies in the page, compressed.
"use strict";

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const code = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(code).text();
}

function draw(plot) {
  if (!window.Plotly || plot.dataset.drawn) return;
  plot.dataset.drawn = "yes";
  const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
  window.Plotly.newPlot(plot, data, layout, { displaylogo: false });
}

async function start() {
  const plots = [...document.querySelectorAll(".plot")];
  try {
    const script = document.createElement("script");
    script.textContent = await unpacked(document.getElementById("plotly").textContent);
    document.head.append(script);
  } catch (error) {
    plots.forEach((plot) => { plot.textContent = `This browser cannot draw the figures (${error}); any from 2023 on can.`; });
    return;
  }
  const watcher = new IntersectionObserver(
    (seen) => seen.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "600px" },
  );
  plots.forEach((plot) => watcher.observe(plot));
  window.addEventListener("beforeprint", () => plots.forEach(draw));
}

start();
