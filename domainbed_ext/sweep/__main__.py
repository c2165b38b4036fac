"""Runs the command. Processes that `spawn` starts load this file too, so it imports nothing for them."""

if __name__ == "__main__":
    from domainbed_ext.sweep.command import main

    main()
