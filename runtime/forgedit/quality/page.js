"use strict";
{
  // without this script both pictures stand side by side, and the grid as the edits were made
  document.documentElement.classList.add("js");

  const compare = document.querySelector(".compare");
  const slider = compare.querySelector("input");
  const after = compare.querySelector(".after");
  const image = after.querySelector("img");
  const label = after.querySelector("figcaption span");
  const back = document.querySelector(".back");
  const edit = { src: image.src, alt: image.alt, label: label.textContent };

  const move = () => {
    compare.style.setProperty("--at", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${Math.round(slider.value)} % original, the rest ${label.textContent}`);
  };
  compare.closest(".first").style.setProperty("--ratio", compare.dataset.width / compare.dataset.height);
  slider.addEventListener("input", move);
  move();

  // any picture of the grid can be laid over the original
  const lay = (picture) => {
    image.src = picture.src;
    image.alt = picture.alt;
    label.textContent = picture.label;
    back.hidden = picture === edit;
    move();
  };
  back.querySelector("button").addEventListener("click", () => {
    lay(edit);
    slider.focus();
  });
  const tiles = [...document.querySelectorAll(".grid li")];
  for (const tile of tiles) {
    const small = tile.querySelector("img");
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Compare with the original";
    small.replaceWith(button);
    button.append(small);
    button.addEventListener("click", () => {
      lay({ src: small.src, alt: small.alt, label: tile.querySelector("h3").textContent });
      compare.scrollIntoView({ block: "nearest" });
      slider.focus({ preventScroll: true });
    });
  }

  const sort = document.querySelector(".sort");
  if (sort) {
    const menu = sort.querySelector("select");
    const grid = document.querySelector(".grid");
    const status = document.querySelector("[role=status]");
    sort.hidden = false;
    menu.addEventListener("change", () => {
      const option = menu.selectedOptions[0];
      const sign = "lowest" in option.dataset ? 1 : -1;
      // what has no such score stands last; equal ones as they were made
      const key = (tile) => {
        const value = JSON.parse(tile.dataset.scores)[menu.value];
        return value === null ? Infinity : sign * value;
      };
      const order = menu.value === "" ? tiles : tiles.toSorted((one, other) => key(one) - key(other) || 0);
      grid.append(...order);
      status.textContent = `Sorted: ${option.textContent}`;
    });
  }
}
