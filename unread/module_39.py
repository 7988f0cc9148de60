def function_39(x):
    return x + 39
def function_39(x):
    return x + 39
def function_39(x):
    return x + 39
def function_39(x):
    return x + 39
def function_39(x):
    return x + 39
