// Shows the HTML of panels.py, and reports a click on what carries data-open.

const PAUSE = 700; // milliseconds

export default function ({ data, parentElement, setTriggerValue }) {
    const root = parentElement.querySelector(".root");
    const html = new TextDecoder().decode(data);
    if (root.shown !== html) {
        root.innerHTML = html;
        root.shown = html;
        root.busyUntil = 0;
    }
    root.onclick = event => {
        const target = event.target.closest("[data-open]");
        // The second click of a double click would interrupt the answer to the first,
        // and open half of what that one asked for.
        const busy = root.busyUntil > Date.now();
        if (target && !busy) {
            root.busyUntil = Date.now() + PAUSE;
            setTriggerValue("open", target.dataset.open);
        }
    };
}
