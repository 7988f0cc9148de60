def function_29(x):
    return x + 29
def function_29(x):
    return x + 29
def function_29(x):
    return x + 29
def function_29(x):
    return x + 29
def function_29(x):
    return x + 29
