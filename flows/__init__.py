"""When, in what order, and what to do on failure: the four jobs as Prefect flows.

Importing this package sets what Prefect and Ray read from the environment, because both read it
once, when they are imported themselves.
"""

from flows.environment import prepare

prepare()
