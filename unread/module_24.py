def function_24(x):
    return x + 24
def function_24(x):
    return x + 24
def function_24(x):
    return x + 24
def function_24(x):
    return x + 24
def function_24(x):
    return x + 24
