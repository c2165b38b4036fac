// Line charts of a run, as SVG.
const NS = "http://www.w3.org/2000/svg";
const svg = (name, attributes = {}, text = "") => {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
};
const html = (name, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
};

// Round numbers that span some values: at most `most` + 1 of them.
const ticksOf = (low, high, most = 4) => {
  const rough = (high - low || Math.abs(high) || 1) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const ticks = [];
  for (let tick = Math.floor(low / step) * step; tick < high + step * 0.999; tick += step) ticks.push(Number(tick.toPrecision(6)));
  return ticks;
};

// `lines`: name, class, colour (or none) and values of each; null where nothing was measured.
const chart = (title, steps, lines, chosen) => {
  const shown = lines.filter(({ values }) => values.some((value) => value !== null));
  const finite = shown.flatMap(({ values }) => values.filter((value) => value !== null));
  if (steps.length < 2 || finite.length < 2) return null;
  const [width, height] = [300, 120];
  const ticks = ticksOf(Math.min(...finite), Math.max(...finite));
  const [low, high] = [ticks[0], ticks[ticks.length - 1]];
  const x = (step) => (width * (step - steps[0])) / (steps[steps.length - 1] - steps[0]);
  const y = (value) => height * (high - value) / (high - low);
  const drawing = svg("svg", { role: "img", "aria-label": title, viewBox: `-34 -8 ${width + 48} ${height + 38}` });
  for (const tick of ticks) {
    drawing.append(svg("path", { class: "grid", d: `M0,${y(tick)} H${width}` }));
    drawing.append(svg("text", { x: -5, y: y(tick) + 3.5, "text-anchor": "end" }, String(tick)));
  }
  drawing.append(svg("path", { class: "axis", d: `M0,0 V${height} H${width}` }));
  for (const step of chosen) drawing.append(svg("path", { class: "chosen", d: `M${x(step)},0 V${height}` }));
  for (const { kind, colour, values } of shown) {
    const points = steps.map((step, place) => [x(step), values[place]]).filter(([, value]) => value !== null).map(([left, value]) => [left, y(value)]);
    drawing.append(svg("polyline", { class: kind, points: points.join(" "), ...(colour && { style: `stroke: ${colour}` }) }));
    for (const [cx, cy] of points) drawing.append(svg("circle", { class: kind, cx, cy, r: 1.8, ...(colour && { style: `fill: ${colour}` }) }));
  }
  drawing.append(svg("text", { x: 0, y: height + 14 }, String(steps[0])));
  drawing.append(svg("text", { x: width, y: height + 14, "text-anchor": "end" }, String(steps[steps.length - 1])));
  drawing.append(svg("text", { x: width / 2, y: height + 26, "text-anchor": "middle" }, "step"));
  const caption = html("figcaption", {}, title);
  if (lines.length > 1) {
    for (const { name, kind, colour } of shown) {
      const sample = svg("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" });
      sample.append(svg("polyline", { class: kind, points: "0,4 22,4", ...(colour && { style: `stroke: ${colour}` }) }));
      caption.append(html("span", { className: "mark" }, sample, name));
    }
  }
  return html("figure", { className: "chart" }, caption, drawing);
};
