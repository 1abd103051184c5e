"""What the scripts must agree on: where the images are, how they become pixels, models, losses and results."""
import functools
import sys


class UserError(Exception):
    """Something that the user can mend; its message is one line that says what is wrong and what to do."""


def command(main):
    """Wrap a script's `main`: a user's mistake, or a file system that refuses, ends with one line on stderr and exit code 2."""
    @functools.wraps(main)
    def wrapped():
        try:
            main()
        except (UserError, OSError) as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
    return wrapped
