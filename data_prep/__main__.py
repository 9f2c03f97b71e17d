"""python -m data_prep: see data_prep.command. Workers import this file again, so it imports nothing slow."""


def main(arguments: list[str] | None = None) -> None:
    from data_prep.command import main as command

    command(arguments)


if __name__ == "__main__":
    main()
