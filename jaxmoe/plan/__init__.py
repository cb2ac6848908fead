"""Will it fit, how long will it take, what will it cost: before any of it is paid for."""
