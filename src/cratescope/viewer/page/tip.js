"use strict";
// One tip for the whole page: what is under the pointer, or has the focus, says more in its data-tip.
(() => {
  const box = document.getElementById("tip");

  function show(target) {
    const about = target.closest?.("[data-tip]");
    if (!about || !about.dataset.tip) return hide();
    box.textContent = about.dataset.tip;
    box.hidden = false;
    return place(about.getBoundingClientRect());
  }

  function place(about) {
    const { width, height } = box.getBoundingClientRect();
    const below = about.bottom + 6 + height < innerHeight;
    const left = Math.max(8, Math.min(about.left, document.documentElement.clientWidth - width - 8));
    box.style.left = `${left}px`;
    box.style.top = `${Math.max(4, below ? about.bottom + 6 : about.top - height - 6)}px`;
  }

  /** The tip of a place inside `target`, such as a point of a plot. */
  function showAt(target, { left, top }) {
    const box = target.getBoundingClientRect();
    show(target);
    place(new DOMRect(box.left + left + 8, box.top + top, 0, 8));
  }

  const hide = () => {
    box.hidden = true;
  };

  document.addEventListener("mouseover", (event) => show(event.target));
  document.addEventListener("focusin", (event) => show(event.target));
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, { capture: true, passive: true });
  Object.assign(Cratescope, { hideTip: hide, showTip: showAt });
})();
