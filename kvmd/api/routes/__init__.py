"""The API's resources, one file each: a function that makes a router of the services that it stands on.

All endpoints are coroutines: FastAPI would run a plain function in a worker thread.
"""
