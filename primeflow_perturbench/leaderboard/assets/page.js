"use strict";
{
  const root = document.documentElement;
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

  /* Sort key of a cell: a number, a text, or null, which sorts last in both directions. */
  const key = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value === "") return null;
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  };

  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a === b ? 0 : a < b ? -1 : 1;
    return collator.compare(String(a), String(b));
  };

  const sorted = (rows, column, direction) => {
    if (direction === "none") return rows;
    const sign = direction === "ascending" ? 1 : -1;
    const keyed = rows.map((row) => [key(row, column), row]);
    keyed.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
    return keyed.map(([, row]) => row);
  };

  const reverse = { ascending: "descending", descending: "ascending" };

  const setUpTable = (block) => {
    const body = block.querySelector("tbody");
    if (!body) return;
    const filter = block.querySelector("input");
    const count = block.querySelector(".count");
    const fold = block.querySelector(".fold");
    const limit = Number(block.dataset.fold);
    const original = [...body.rows];
    let texts = null;
    let column = 0;
    let direction = "none";

    const words = () => (filter ? filter.value.toLowerCase().split(/\s+/).filter(Boolean) : []);

    const matching = () => {
      const wanted = words();
      if (!wanted.length) return original;
      texts ??= original.map((row) => [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
      return original.filter((_, index) => wanted.every((word) => texts[index].includes(word)));
    };

    const show = () => {
      const rows = sorted(matching(), column, direction);
      body.replaceChildren(...rows);
      if (count) {
        const all = original.length.toLocaleString("en");
        count.textContent = rows.length < original.length ? `${rows.length.toLocaleString("en")} of ${all} rows` : `${all} rows`;
      }
      if (fold) {
        fold.hidden = rows.length <= limit;
        const open = block.classList.contains("open");
        fold.textContent = open ? `Show the first ${limit}` : `Show all ${rows.length.toLocaleString("en")} rows`;
        fold.setAttribute("aria-expanded", String(open));
      }
    };

    const headings = [...block.querySelectorAll("thead th")];
    headings.forEach((heading, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const first = heading.dataset.first;
        const before = heading.getAttribute("aria-sort") ?? "none";
        direction = before === "none" ? first : before === first ? reverse[first] : "none";
        column = index;
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        if (direction !== "none") heading.setAttribute("aria-sort", direction);
        show();
      });
    });
    filter?.addEventListener("input", show);
    fold?.addEventListener("click", () => {
      block.classList.toggle("open");
      show();
    });
    show();
  };

  document.querySelectorAll(".table").forEach(setUpTable);

  /* A figure opens enlarged in the dialog; the arrow keys move to its neighbors. */
  const dialog = document.querySelector("dialog");
  const figures = [...document.querySelectorAll("main figure")];
  let shown = 0;

  const place = (index) => {
    shown = (index + figures.length) % figures.length;
    const figure = figures[shown];
    const image = dialog.querySelector("img");
    image.src = figure.querySelector("img").src;
    image.alt = figure.querySelector("img").alt;
    dialog.querySelector("h2").textContent = figure.querySelector("figcaption b").textContent;
    dialog.querySelector("p").textContent = figure.querySelector("figcaption span")?.textContent ?? "";
    dialog.querySelector(".place").textContent = `${shown + 1} of ${figures.length}`;
  };

  figures.forEach((figure, index) => {
    const image = figure.querySelector("img");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "zoom";
    button.setAttribute("aria-haspopup", "dialog");
    button.title = "Enlarge";
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => {
      place(index);
      dialog.showModal();
    });
  });

  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.querySelector(".previous").addEventListener("click", () => place(shown - 1));
  dialog.querySelector(".next").addEventListener("click", () => place(shown + 1));
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") place(shown - 1);
    if (event.key === "ArrowRight") place(shown + 1);
  });

  /* The theme follows the system until the reader presses the button. */
  const toggle = document.querySelector(".theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const remembered = () => {
    try {
      return localStorage.getItem("theme");
    } catch {
      return null;
    }
  };
  const dark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const mark = () => {
    toggle.setAttribute("aria-pressed", String(dark()));
  };
  if (remembered()) root.dataset.theme = remembered();
  toggle.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    mark();
    try {
      localStorage.setItem("theme", root.dataset.theme);
    } catch {
      /* Some browsers store nothing for local files. */
    }
  });
  system.addEventListener("change", mark);
  mark();

  /* The contents highlight the section being read. */
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash, link]));
  const reading = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const link = links.get(`#${encodeURI(entry.target.id)}`);
        if (entry.isIntersecting) link?.setAttribute("aria-current", "true");
        else link?.removeAttribute("aria-current");
      }
    },
    { rootMargin: "-15% 0px -80% 0px" },
  );
  document.querySelectorAll("main > section").forEach((section) => reading.observe(section));
}
