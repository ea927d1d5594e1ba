// Tables of a report: a click on a column's name sorts the rows, a field above filters them.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  if (rows.length < 2) continue;

  // "1.172 M ± 0.1" → 1172000; NaN for a cell that does not begin with a number.
  const number = (text) => {
    const match = /^([-+−]?)([\d,]*\.?\d+(?:e[-+]?\d+)?)\s*([kMGTPEZY]?)(?![a-z])/.exec(text);
    if (!match) return NaN;
    const size = 1000 ** " kMGTPEZY".indexOf(match[3] || " ");
    return (match[1] && match[1] !== "+" ? -1 : 1) * Number(match[2].replaceAll(",", "")) * size;
  };
  const compare = (a, b) => {
    const [x, y] = [number(a), number(b)];
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y) || a.localeCompare(b);
    return x - y;
  };
  const text = (row, column) => row.cells[column].textContent.trim();

  const headers = [...table.tHead.rows[0].cells];
  const sort = (column) => {
    const header = headers[column];
    const order = { none: "descending", descending: "ascending", ascending: "none" };
    const next = order[header.ariaSort ?? "none"];
    for (const other of headers) other.ariaSort = "none";
    header.ariaSort = next;
    const sorted = [...rows];
    const sign = next === "descending" ? -1 : 1;
    if (next !== "none") sorted.sort((a, b) => sign * compare(text(a, column), text(b, column)));
    body.append(...sorted);
  };
  headers.forEach((header, column) => {
    header.tabIndex = 0;
    header.title = "Sort";
    header.onclick = () => sort(column);
    header.onkeydown = (event) => event.key === "Enter" && sort(column);
  });

  if (rows.length < 5) continue;
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = field.ariaLabel = "Filter rows";
  field.oninput = () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => content.includes(word));
    }
  };
  table.before(field);
}
