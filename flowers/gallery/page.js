// Shows the HTML of panels.py, and reports a click on what carries data-open.

const PAUSE = 700; // milliseconds
const SETTLE = 80; // milliseconds after which Streamlit has said that it is busy
const BUTTON = "[data-testid=stButton] button";
const KEYS = ["ArrowLeft", "ArrowRight", "Escape", "s", "S"]; // the shortcuts of web.py
const MAX_UPLOAD = 10 * 2 ** 20; // bytes: MAX_UPLOAD_BYTES of thumbnails.py
const REMOVE = "[data-testid=stFileChipDeleteBtn] button, button[data-testid=stFileChipDeleteBtn]";

const OPEN_LIST = "[role=combobox][aria-expanded=true]";

let lastPress = -Infinity;
let lastPressed = null; // a key, or a button
let closesList = false; // whether the key that is pressed does

// Until the answer has come, the buttons do what they did at the last press: another press of the
// same, or a key that is held, asks for the same once more. Hundreds of these would stop the browser.
// Another key or button is another wish, but for the moment in which a hand hits two at once.
function holdBack(event) {
    const target = event.composedPath()[0];
    const typing = target.closest("input, textarea");
    const isShortcut = event.type === "keydown" && KEYS.includes(event.key) && !typing;
    const isButton = event.type === "click" && target.closest(BUTTON);
    if (!isShortcut && !isButton) {
        return;
    }
    const pressed = isShortcut ? event.key.toLowerCase() : isButton;
    const pause = Date.now() - lastPress;
    const running = document.querySelector("[data-test-script-state=running]");
    if (pause < SETTLE || (running && pause < PAUSE && pressed === lastPressed)) {
        event.stopImmediatePropagation();
        event.preventDefault();
    } else {
        lastPress = Date.now();
        lastPressed = pressed;
    }
}

// Escape closes an open list, and that alone: it must not reach the document, whose listener presses
// the button with that shortcut, and does so from within a list, too.
function noteOpenList(event) {
    closesList = event.key === "Escape" && event.target.closest(OPEN_LIST) !== null;
}

function keepFromShortcuts(event) {
    if (closesList) {
        event.stopPropagation();
    }
}

// Streamlit refuses a file that is too large, and says so, but the file before it stays: so does the
// answer about that one, which would be taken for one about the new file.
function removeFormer(event) {
    const uploader = event.target.closest?.("[data-testid=stFileUploader]");
    const files = event.type === "drop" ? event.dataTransfer?.files : event.target.files;
    if (uploader && [...(files ?? [])].some(file => file.size > MAX_UPLOAD)) {
        uploader.querySelector(REMOVE)?.click();
    }
}

// Once for a document, before any listener of Streamlit's, however often this file is loaded.
if (!window.flowersHoldBack) {
    window.flowersHoldBack = true;
    window.addEventListener("keydown", noteOpenList, true);
    window.addEventListener("keydown", holdBack, true);
    document.body.addEventListener("keydown", keepFromShortcuts);
    window.addEventListener("click", holdBack, true);
    window.addEventListener("change", removeFormer, true);
    window.addEventListener("drop", removeFormer, true);
}

export default function ({ data, parentElement, setTriggerValue }) {
    const root = parentElement.querySelector(".root");
    const html = new TextDecoder().decode(data);
    if (root.shown !== html) {
        root.innerHTML = html;
        root.shown = html;
        root.busyUntil = 0;
        // Back from a picture to where it is in the grid.
        root.querySelector(".pictures .on")?.scrollIntoView({ block: "nearest" });
        // A picture that was opened from below, or under the filters of a small screen.
        const image = root.querySelector(".image");
        const top = image?.getBoundingClientRect().top;
        if (image && (top < 0 || top > window.innerHeight / 2)) {
            image.scrollIntoView();
        }
    }
    root.onclick = event => {
        const target = event.target.closest("[data-open]");
        // A picture is a link: the browser itself opens it in another tab or window.
        if (!target || event.ctrlKey || event.metaKey || event.shiftKey) {
            return;
        }
        event.preventDefault();
        // The second click of a double click would interrupt the answer to the first,
        // and open half of what that one asked for.
        const busy = root.busyUntil > Date.now();
        if (!busy) {
            root.busyUntil = Date.now() + PAUSE;
            setTriggerValue("open", target.dataset.open);
        }
    };
}
