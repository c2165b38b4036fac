"""Runs the command. Processes that decode images load this file too, so it imports nothing for them."""

if __name__ == "__main__":
    from domainbed_ext.prepare.command import main

    main()
