// Two methods, and their differences. Each pair is in the table once; chosen in the other order, its signs are turned.
for (const controls of document.querySelectorAll(".pairs")) {
  const [first, second, metric] = ["first", "second", "metric"].map((by) => controls.querySelector(`[data-by=${by}]`));
  const rows = [...controls.closest("article").querySelectorAll("tbody tr")];
  const turnSign = (text) => text.replace(/[+−]/g, (sign) => (sign === "+" ? "−" : "+"));
  const turn = (row) => {
    const { first: one, second: other } = row.dataset;
    [row.dataset.first, row.dataset.second] = [other, one];
    const [method, minus, , difference, , , , signs] = row.cells;
    [method.textContent, minus.textContent] = [minus.textContent, method.textContent];
    [method.title, minus.title] = [minus.title, method.title];
    const [number, interval] = [difference.firstChild, difference.querySelector(".error")];
    number.data = turnSign(number.data).replace(/^−0\.0/, "+0.0");
    if (interval) interval.textContent = turnSign(interval.textContent).replace(/\((.*) to (.*)\)/, "($2 to $1)").replaceAll("−0.0", "+0.0");
    [signs.textContent, row.dataset.lower] = [row.dataset.lower, signs.textContent];
    row.classList.toggle("turned");
  };
  const fits = ({ dataset }, one, other) => (!one || dataset.first === one) && (!other || dataset.second === other);
  const refresh = () => {
    const [one, other] = [first.value, second.value];
    for (const row of rows) {
      if (one || other) {
        if (!fits(row, one, other) && fits(row, other, one)) turn(row);
      } else if (row.classList.contains("turned")) turn(row);
      row.hidden = !(fits(row, one, other) && (!metric.value || row.dataset.metric === metric.value));
    }
  };
  const choices = [first, second, metric];
  for (const select of choices) {
    select.addEventListener("change", () => {
      refresh();
      const shown = rows.filter((row) => !row.hidden);
      announce(`${shown.length} ${shown.length === 1 ? "difference is" : "differences are"} shown.`);
    });
  }
  if (controls.dataset.chosen) [first.value, second.value] = controls.dataset.chosen.split("\n");
  controls.hidden = false;
  refresh();
}
